"""The only room that runs neural networks: the silero speech detector, SenseVoice's features, and its two recognizers.

onnxruntime is the first engine, because its posteriors are ours; sherpa-onnx is the second, for accelerators only it
reaches and as the oracle of the first. sherpa-onnx ends the process on a model it does not like, so every model passes
:func:`check_contract` under onnxruntime, which raises instead, before sherpa-onnx sees it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import kaldi_native_fbank as knf
import numpy as np
import onnxruntime as ort

from edge_asr.audio import at_speed, signal_to_noise_db, to_float
from edge_asr.events import FRAME_SAMPLES, SAMPLE_RATE, Token, Transcript
from edge_asr.model_store import ModelError, Provider
from edge_asr.optimization import LOG_POSTERIORS, LOGITS
from edge_asr.posteriors import (
    FRAME_S,
    TAG_FRAMES,
    WORD_START,
    Recognition,
    TokenTable,
    foreign,
    log_softmax,
    transcribe,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_asr import settings
    from edge_asr.model_store import ModelFiles

log = logging.getLogger(__name__)

MAX_UTTERANCE_S: Final = 31.0
"""Longer audio in one piece costs gigabytes that onnxruntime never gives back (300 s: 2.6 GB); the gate's longest limit
is a second less."""

MIN_SAMPLES: Final = 400
"""25 ms: one feature window; less has no frame at all."""

BUILD_LIMIT_S: Final = 1800.0
"""For TensorRT's first meeting with a model; a guess, for it was never run here (docs/jetson.md)."""

_ENGINES: Final = f".tensorrt-{ort.__version__}"
"""Folder of TensorRT's engines, of which another version of onnxruntime has no use."""

_INPUTS: Final = {
    "x": "tensor(float)",
    "x_length": "tensor(int32)",
    "language": "tensor(int32)",
    "text_norm": "tensor(int32)",
}
_LANGUAGES: Final = ("auto", "zh", "en", "yue", "ja", "ko")
_PROVIDERS: Final = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


class RecognizerError(Exception):
    """One utterance could not be recognized; the next one may."""


@dataclass(frozen=True)
class Contract:
    """What a SenseVoice ONNX file says of itself in its metadata."""

    lfr_window: int
    """Feature frames stacked into one model frame."""
    lfr_shift: int
    """Feature frames between two model frames."""
    scale: float
    """Factor from [-1, 1) audio to what the features were computed on (32768 for the released models)."""
    neg_mean: NDArray[np.float32]
    inv_stddev: NDArray[np.float32]
    language_ids: Mapping[str, int]
    with_itn: int
    without_itn: int
    vocabulary: int


def check_contract(session: ort.InferenceSession, path: Path) -> Contract:
    """Read and check the metadata, the inputs and the output; raises ModelError naming what is wrong."""
    inputs = {i.name: i.type for i in session.get_inputs()}
    if list(inputs.items()) != list(_INPUTS.items()):  # in this order: sherpa-onnx feeds them by place
        raise ModelError(f"{path}: inputs are {inputs}, expected {_INPUTS}; this is not a SenseVoice model")
    meta = session.get_modelmeta().custom_metadata_map
    try:
        contract = Contract(
            lfr_window=int(meta["lfr_window_size"]),
            lfr_shift=int(meta["lfr_window_shift"]),
            scale=1.0 if int(meta["normalize_samples"]) else 32768.0,
            neg_mean=np.array(meta["neg_mean"].split(","), dtype=np.float32),
            inv_stddev=np.array(meta["inv_stddev"].split(","), dtype=np.float32),
            language_ids={name: int(meta[f"lang_{name}"]) for name in _LANGUAGES},
            with_itn=int(meta["with_itn"]),
            without_itn=int(meta["without_itn"]),
            vocabulary=int(meta["vocab_size"]),
        )
    except KeyError as error:
        raise ModelError(
            f"{path}: metadata {error} is missing; export it with sherpa-onnx's SenseVoice metadata"
        ) from None
    except ValueError as error:
        raise ModelError(f"{path}: metadata is damaged ({error}); import the model again") from None
    feature_shape = session.get_inputs()[0].shape
    dim = 80 * contract.lfr_window
    if not (len(feature_shape) == 3 and contract.neg_mean.size == contract.inv_stddev.size == feature_shape[2] == dim):
        raise ModelError(
            f"{path}: CMVN has {contract.neg_mean.size} values for {feature_shape} features; import the model again"
        )
    if contract.lfr_shift < 1 or not np.isfinite([contract.neg_mean, contract.inv_stddev]).all():
        raise ModelError(f"{path}: metadata is damaged (lfr_window_shift or CMVN); import the model again")
    outputs = {output.name: output.shape for output in session.get_outputs()}
    logits = outputs.get(LOGITS, outputs.get(LOG_POSTERIORS, []))
    if len(logits) != 3 or (isinstance(logits[2], int) and logits[2] != contract.vocabulary):
        raise ModelError(
            f"{path}: has no output logits [.., .., {contract.vocabulary}]; this is not a SenseVoice model"
        )
    return contract


def save_fused(model: Path, to: Path) -> None:
    """Write a model as onnxruntime has fused its operators, for any CPU of this kind. Raises ModelError."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(to)
    _open_session(model, options=options)


def _open_session(
    path: Path,
    *,
    provider: Provider = "cpu",
    threads: int = 1,
    options: ort.SessionOptions | None = None,
    engines: Path | None = None,
) -> ort.InferenceSession:
    """An onnxruntime session that does not spin; raises ModelError on a file it cannot read."""
    options = options or ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning burns 29 ms after every call
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(path), options, providers=_providers(provider, engines))
    except Exception as error:  # noqa: BLE001 - onnxruntime raises a dozen unrelated classes: not a usable model
        reason = str(error).splitlines()[0][:160]
        raise ModelError(f"{path}: onnxruntime cannot load it ({reason}); import the model again") from None
    if session.get_providers()[0] != _PROVIDERS[provider]:
        log.warning("onnxruntime has no %s here: the model runs on the CPU; install a matching wheel", provider)
    return session


def _providers(wanted: Provider, engines: Path | None) -> list[str | tuple[str, dict[str, str]]]:
    """What onnxruntime is to take, the best first; what TensorRT cannot do is CUDA's."""
    ranked: dict[Provider, tuple[Provider, ...]] = {"cpu": (), "cuda": ("cuda",), "tensorrt": ("tensorrt", "cuda")}
    chosen = [each for each in (*ranked[wanted], "cpu") if _PROVIDERS[each] in ort.get_available_providers()]
    return [(_PROVIDERS[each], _tensorrt(engines)) if each == "tensorrt" else _PROVIDERS[each] for each in chosen]


def _tensorrt(engines: Path | None) -> dict[str, str]:
    """One engine for speech of any length, for building one takes minutes; kept in a folder, where there is one."""

    def shapes(seconds: float) -> str:
        return f"x:1x{max(1, round(seconds / FRAME_S))}x560,x_length:1,language:1,text_norm:1"

    usual, longest = shapes(3.0), shapes(2 * MAX_UTTERANCE_S)  # it may be listened to again, slower
    kept = {"trt_profile_min_shapes": shapes(0.0), "trt_profile_opt_shapes": usual, "trt_profile_max_shapes": longest}
    if engines is not None:
        with contextlib.suppress(OSError):  # somebody who may not write there builds it for this once
            engines.mkdir(parents=True, exist_ok=True)
            kept |= dict.fromkeys(("trt_engine_cache_enable", "trt_timing_cache_enable"), "True")
            kept["trt_engine_cache_path"] = kept["trt_timing_cache_path"] = str(engines)
    return kept


class Features:
    """Kaldi fbank (80 bins, Hamming, no dither), stacked by low frame rate (LFR) and normalised (CMVN).

    LFR as in sherpa-onnx 2.0.1: the first frame three times on the left, the last repeated on the right, ceil(n / 6)
    windows of 7. Other padding changes the text (20 of 20 equal this way, 10 of 20 with no left padding).

    A fbank frame depends on its own 25 ms alone. So of an utterance that has grown since it was last seen (a partial,
    then a longer one, then the final) only the new frames are computed, and the result is the same in every bit.
    """

    FRAME: Final = MIN_SAMPLES
    HOP: Final = 160
    KEPT: Final = 4
    """Utterances that may grow at once; with more sources than that the frames of some are computed anew."""

    def __init__(self, contract: Contract) -> None:
        self._contract = contract
        options = knf.FbankOptions()
        options.frame_opts.samp_freq = SAMPLE_RATE
        options.frame_opts.dither = 0.0
        options.frame_opts.window_type = "hamming"
        options.frame_opts.snip_edges = True
        options.mel_opts.num_bins = 80
        options.mel_opts.high_freq = 0.0
        self._options = options
        self._grown: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
        """(samples, their fbank frames) of the last utterances, the newest first."""

    def __call__(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """[samples] in [-1, 1) -> [frames, 560]; no frame below 25 ms."""
        return self._stacked(self.fbank(samples))

    def grown(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """The same; what an earlier call has computed of the beginning of these samples is not computed again."""
        earlier = next((each for each in self._grown if _same_beginning(each[0], samples)), None)
        known = np.zeros((0, self._options.mel_opts.num_bins), np.float32)
        if earlier is not None:
            shared = min(len(earlier[0]), len(samples))
            known = earlier[1][: (shared - self.FRAME) // self.HOP + 1]
        frames = np.concatenate([known, self.fbank(samples[len(known) * self.HOP :])])
        longest = earlier if earlier is not None and len(earlier[0]) > len(samples) else (samples, frames)
        self._grown = [longest, *(each for each in self._grown if each is not earlier)][: self.KEPT]
        return self._stacked(frames)

    def fbank(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """[samples] in [-1, 1) -> [fbank frames, 80]."""
        fbank = knf.OnlineFbank(self._options)
        fbank.accept_waveform(SAMPLE_RATE, samples * np.float32(self._contract.scale))
        fbank.input_finished()
        frames = [fbank.get_frame(i) for i in range(fbank.num_frames_ready)]
        return np.stack(frames) if frames else np.zeros((0, self._options.mel_opts.num_bins), np.float32)

    def _stacked(self, frames: NDArray[np.float32]) -> NDArray[np.float32]:
        count = len(frames)
        if count == 0:
            return np.zeros((0, self._contract.neg_mean.size), np.float32)
        window, shift = self._contract.lfr_window, self._contract.lfr_shift
        left = (window - 1) // 2
        windows = -(-count // shift)
        index = np.clip(np.arange(windows)[:, None] * shift + np.arange(window)[None, :] - left, 0, count - 1)
        stacked = frames[index].reshape(windows, -1)
        return np.ascontiguousarray((stacked + self._contract.neg_mean) * self._contract.inv_stddev, dtype=np.float32)


def _same_beginning(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    shared = min(len(one), len(other))
    return shared >= MIN_SAMPLES and np.array_equal(one[:shared], other[:shared])


class OnnxRecognizer:
    """SenseVoice on onnxruntime: text, tags, token times, confidence and log-posteriors."""

    def __init__(
        self, files: ModelFiles, options: settings.Model, graph: Path | None = None, engines: Path | None = None
    ) -> None:
        """``graph``: an equivalent of the model's own (``prepared``) to run in its place; ``engines``: TensorRT's."""
        self.name = files.name
        self._session = _open_session(
            graph or files.model, provider=options.provider, threads=options.threads, engines=engines
        )
        self._output = self._session.get_outputs()[0].name
        self._contract = check_contract(self._session, files.model)
        self.table = load_tokens(files.tokens, self._contract.vocabulary)
        in_use = self._session.get_providers()[0]
        self.provider = next(name for name, theirs in _PROVIDERS.items() if theirs == in_use)
        """The one really in use, named as in the settings."""
        self._features = Features(self._contract)
        self._language = options.language
        self.languages: tuple[str, ...] = options.languages if options.language == "auto" else (options.language,)
        itn = self._contract.with_itn if options.use_itn else self._contract.without_itn
        self._text_norm = np.array([itn], np.int32)
        self.step: Callable[[], None] = lambda: None
        """Called before each run of the model, of which an utterance may need eight (languages, paces), and between the
        steps of other work that may take long."""

    def recognize(self, pcm: bytes) -> Recognition:
        """Decode one utterance of 16 kHz mono int16. Raises RecognizerError."""
        samples = _checked(pcm)
        features = self._features.grown(samples)
        heard = self._decode(samples, features, self._language)
        if self._language == "auto" and foreign(heard.transcript, self.languages):  # again, for what is spoken here
            again = (self._decode(samples, features, language) for language in self.languages)
            heard = max(again, key=self._belonging)
        return heard

    def give_back(self) -> None:
        """Let go of what the longest utterance took, 80 MB after one of 20 s; a few milliseconds.

        onnxruntime's arena shrinks behind a run and only if asked to, so something short is run.
        """
        if self.provider == "cpu":
            options = ort.RunOptions()
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
            short = self._features(np.zeros(MIN_SAMPLES, np.float32))
            self._session.run([self._output], self._feed(short, self._language), options)

    def _belonging(self, recognition: Recognition) -> tuple[bool, float]:
        """How well a recognition belongs to the site: what is no text of its languages, however sure, comes last."""
        transcript = recognition.transcript
        return bool(transcript.text) and not foreign(transcript, self.languages), transcript.confidence

    def _decode(self, samples: NDArray[np.float32], features: NDArray[np.float32], language: str) -> Recognition:
        tag_rows, log_posteriors = self._scores(features, language)
        tags = [self.table.tag(int(i)) for i in tag_rows.argmax(axis=1)]

        def at_pace(pace: float) -> NDArray[np.float32]:
            return self._scores(self._features(at_speed(samples, pace)), language)[1]

        transcript = transcribe(log_posteriors, tags, self.table)
        return Recognition(transcript, log_posteriors, signal_to_noise_db(samples), at_pace)

    def _scores(self, features: NDArray[np.float32], language: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The tag frames, of any scale, and the log-posteriors of the others."""
        self.step()
        try:
            scores: NDArray[np.float32] = self._session.run([self._output], self._feed(features, language))[0][0]
        except Exception as error:  # onnxruntime's classes share no base but this
            raise RecognizerError(f"onnxruntime failed on {len(features)} frames of audio: {error}") from error
        spoken = scores[TAG_FRAMES:]
        return scores[:TAG_FRAMES], spoken if self._output == LOG_POSTERIORS else log_softmax(spoken)

    def _feed(self, features: NDArray[np.float32], language: str) -> dict[str, NDArray[Any]]:
        return {
            "x": features[None],
            "x_length": np.array([len(features)], np.int32),
            "language": np.array([self._contract.language_ids[language]], np.int32),
            "text_norm": self._text_norm,
        }


class SherpaRecognizer:
    """SenseVoice on sherpa-onnx: text, tags and token times; it keeps the posteriors to itself."""

    def __init__(self, files: ModelFiles, options: settings.Model) -> None:
        import sherpa_onnx  # noqa: PLC0415 - 30 MB that the default engine does not need

        self.name = files.name
        session = _open_session(files.model)
        contract = check_contract(session, files.model)
        if "Nano" in session.get_modelmeta().custom_metadata_map.get("comment", ""):
            raise ModelError(f"{files.model}: sherpa-onnx takes its comment for FunASR-Nano's; use engine onnxruntime")
        self.table = load_tokens(files.tokens, contract.vocabulary)
        self.provider = reachable(options)
        """The one in use as far as sherpa-onnx lets one know, named as in the settings."""
        if self.provider != options.provider:
            log.warning(
                "sherpa-onnx has no %s here: the model runs on the CPU; install a matching wheel", options.provider
            )
        self.languages: tuple[str, ...] = options.languages if options.language == "auto" else (options.language,)
        self._recognizer: Any = sherpa_onnx.OfflineRecognizer.from_sense_voice(
            model=str(files.model),
            tokens=str(files.tokens),
            num_threads=options.threads,
            provider=self.provider,
            language=options.language,
            use_itn=options.use_itn,
        )
        self.step: Callable[[], None] = lambda: None
        """As :attr:`OnnxRecognizer.step`."""

    def give_back(self) -> None:
        """Nothing: what its session keeps cannot be reached."""

    def recognize(self, pcm: bytes) -> Recognition:
        """Decode one utterance of 16 kHz mono int16. Raises RecognizerError."""
        samples = _checked(pcm)
        self.step()
        try:
            stream = self._recognizer.create_stream()
            stream.accept_waveform(SAMPLE_RATE, samples)
            self._recognizer.decode_stream(stream)
        except Exception as error:  # whatever class the binding makes of a C++ exception
            raise RecognizerError(f"sherpa-onnx failed on {len(samples)} samples of audio: {error}") from error
        result = stream.result
        transcript = Transcript(
            text=result.text.strip(),
            language=result.lang.strip("<|>"),
            emotion=result.emotion.strip("<|>"),
            event=result.event.strip("<|>"),
            confidence=0.0,
            tokens=tuple(
                Token(piece.replace(WORD_START, " "), round(float(start), 3))
                for piece, start in zip(result.tokens, result.timestamps, strict=False)
            ),
        )
        return Recognition(transcript, None, signal_to_noise_db(samples))


def reachable(options: settings.Model) -> Provider:
    """The provider of the settings where the installed engine brings it, else the CPU; weights are chosen by it.

    sherpa-onnx, asked for a provider that its wheel does not bring, takes the CPU in silence.
    """
    wanted = options.provider
    if options.engine == "onnxruntime":
        return wanted if _PROVIDERS[wanted] in ort.get_available_providers() else "cpu"
    import sherpa_onnx  # noqa: PLC0415 - 30 MB that the default engine does not need

    libraries = Path(sherpa_onnx.__file__).parent.rglob(f"libonnxruntime_providers_{wanted}.so*")
    return wanted if wanted == "cpu" or list(libraries) else "cpu"


class SileroDetector:
    """Speech probability per frame by silero VAD (MIT); keeps its own state, so one per source."""

    CONTEXT: Final = 64
    """Samples of the previous frame that the network wants in front."""

    def __init__(self, model: Path) -> None:
        self._session = _silero(model)
        self._rate = np.array(SAMPLE_RATE, np.int64)
        self.reset()

    def reset(self) -> None:
        """Forget what was heard: after a gap the next frame stands alone."""
        self._state = np.zeros((2, 1, 128), np.float32)
        self._input = np.zeros((1, self.CONTEXT + FRAME_SAMPLES), np.float32)

    def probability(self, pcm: bytes) -> float:
        """Probability 0..1 that this frame of :data:`FRAME_SAMPLES` holds speech."""
        self._input[0, : self.CONTEXT] = self._input[0, -self.CONTEXT :]
        self._input[0, self.CONTEXT :] = to_float(pcm)
        output, self._state = self._session.run(None, {"input": self._input, "state": self._state, "sr": self._rate})
        return float(output[0, 0])


@functools.lru_cache(maxsize=1)
def _silero(model: Path) -> ort.InferenceSession:
    """One network for all detectors, which keep their states themselves: it costs megabytes, a state 1 kB."""
    session = _open_session(model)
    if tuple(i.name for i in session.get_inputs()) != ("input", "state", "sr"):
        raise ModelError(f"{model}: is not a silero VAD model; import it again")
    return session


def load_tokens(path: Path, expected: int | None = None) -> TokenTable:
    """Read tokens.txt and hold it against the size of the model's vocabulary; raises ModelError."""
    try:
        table = TokenTable.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ModelError(f"{path}: not a tokens file ({error}); import the model again") from None
    if expected is not None and len(table) != expected:
        raise ModelError(f"{path}: {len(table)} tokens for a model of {expected}; take tokens.txt of the same release")
    return table


def open_recognizer(
    files: ModelFiles, options: settings.Model, graph: Path | None = None, installed: Path | None = None
) -> OnnxRecognizer | SherpaRecognizer:
    """The engine the settings ask for; ``graph``: what onnxruntime is to run in place of the model's own.

    ``installed``: the folder of this box's models, where TensorRT's engines stay; None: they do not.
    """
    if options.engine == "sherpa-onnx":
        return SherpaRecognizer(files, options)
    return OnnxRecognizer(files, options, graph, installed and installed / _ENGINES)


def _checked(pcm: bytes) -> NDArray[np.float32]:
    samples = to_float(pcm)
    if not MIN_SAMPLES <= samples.size <= MAX_UTTERANCE_S * SAMPLE_RATE:
        raise RecognizerError(f"{samples.size / SAMPLE_RATE:.3f} s of audio, expected 0.025..{MAX_UTTERANCE_S:g} s")
    return samples


__all__ = [
    "FRAME_S",
    "Contract",
    "Features",
    "OnnxRecognizer",
    "RecognizerError",
    "SherpaRecognizer",
    "SileroDetector",
    "check_contract",
    "load_tokens",
    "open_recognizer",
    "reachable",
    "save_fused",
]
