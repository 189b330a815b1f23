"""Whether our SenseVoiceSmall and FunASR's say the same of the same weights: the oracle of `sense_voice.py`.

Run as `python -m training.against_funasr` in an environment of its own, to which `pip install funasr==1.4.16` has been
added; nothing else needs it.
"""

from __future__ import annotations

import sys

import torch
from funasr.models.sense_voice.export_meta import export_forward
from funasr.models.sense_voice.model import SenseVoiceSmall

from training import sense_voice

LENGTHS = (40, 31)
"""Frames of the two utterances of the batch; the tag frames come on top."""
TAGS = 4


def theirs(shape: sense_voice.Shape) -> torch.nn.Module:
    """FunASR's network with the settings of the public release."""
    encoder = {
        "output_size": 512,
        "attention_heads": 4,
        "linear_units": 2048,
        "num_blocks": shape.layers,
        "tp_blocks": shape.upper_layers,
        "dropout_rate": 0.1,
        "attention_dropout_rate": 0.1,
        "input_layer": "pe",
        "pos_enc_class": "SinusoidalPositionEncoder",
        "normalize_before": True,
        "kernel_size": 11,
        "sanm_shfit": 0,  # as FunASR spells it
        "selfattention_layer_type": "sanm",
    }
    network = SenseVoiceSmall(
        encoder="SenseVoiceEncoderSmall", encoder_conf=encoder, input_size=560, vocab_size=shape.vocabulary
    )
    return network.eval()


def main() -> int:
    shape = sense_voice.Shape()
    ours, other = sense_voice.rehearsal(shape), theirs(shape)
    print("weights:", other.load_state_dict(ours.state_dict()))
    x = torch.randn(2, max(LENGTHS), 560, generator=torch.Generator().manual_seed(1))
    rest = (torch.tensor(LENGTHS, dtype=torch.int32), torch.tensor([0, 4]).int(), torch.tensor([14, 15]).int())
    with torch.no_grad():
        said, expected = ours(x.clone(), *rest), export_forward(other, x.clone(), *rest)[0]
    is_equal = True
    for at, frames in enumerate(LENGTHS):
        ends = frames + TAGS
        apart = float((said[at, :ends] - expected[at, :ends]).abs().max())
        print(f"utterance of {frames} frames: logits at most {apart:g} apart")
        is_equal &= apart == 0
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
