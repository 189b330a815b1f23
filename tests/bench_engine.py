"""What a decode costs on SenseVoiceSmall's full graph: ours step by step, sherpa-onnx and funasr-onnx, in one run.

Thread CPU time of one thread, contenders taking turns, medians; what counts are ratios to sherpa-onnx on the model as
it is released (8-bit, unsigned). Weights are random (tests/sense_voice.py): costs are those of the released model,
texts are nonsense, so graphs are measured here whether or not they could be proven (``prepared``).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_asr import inference, model_store, onnx_file, optimization, prepared, settings
from edge_asr.events import SAMPLE_RATE
from edge_asr.inference import OnnxRecognizer, SherpaRecognizer
from edge_asr.model_store import ModelFiles
from edge_asr.optimization import Pass
from tests import cpu_mask
from tests.sense_voice import LANGUAGES, SenseVoice

STOCK = "sherpa-onnx"
OURS = "edge-asr"
STEPS: tuple[tuple[str, tuple[Pass, ...]], ...] = (
    ("onnxruntime, the model's own graph", ()),
    ("+ no mask", (optimization.drop_mask,)),
    ("+ signed weights", (optimization.sign_weights,)),
    ("+ SkipLayerNormalization", (optimization.fuse_normalization,)),
    ("+ two-dimensional memory", (optimization.widen_memory,)),
    ("+ thin attention", (optimization.thin_attention,)),
    (OURS, (optimization.end_in_log_posteriors,)),
)
"""What is added to the graph of the step before; the last is the product's."""


@dataclass(frozen=True)
class Contender:
    """One way to decode."""

    name: str
    decode: Callable[[bytes], float]
    """Decodes 16 kHz mono int16; the CPU seconds it took."""


def noise(seconds: int, take: int) -> bytes:
    """Audio that costs what speech costs; another take is other audio, for features of what is known are kept."""
    drawn = np.random.default_rng((seconds, take)).standard_normal(seconds * SAMPLE_RATE) * 1000
    return drawn.astype("<i2").tobytes()


def make_model(folder: Path, blocks: int = 50, more_blocks: int = 20, vocabulary: int = 25055) -> ModelFiles:
    """SenseVoice of some size in a folder that the product, sherpa-onnx and funasr-onnx take."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model.int8.onnx").exists():
        tags = [*(f"<|{name}|>" for name in LANGUAGES if name != "auto"), "<|withitn|>", "<|woitn|>"]
        pieces = ["<unk>", *(f"t{index}" for index in range(1, vocabulary - len(tags))), *tags]
        tokens = "".join(f"{piece} {index}\n" for index, piece in enumerate(pieces))
        (folder / "tokens.txt").write_text(tokens, encoding="utf-8")
        SenseVoice(blocks, more_blocks, vocabulary).save(folder / "model.int8.onnx")
    return model_store.locate(f"{folder}/")


def timed(work: Callable[[Any], object]) -> Callable[[Any], float]:
    """The same work, giving the CPU seconds of this thread."""

    def spent_s(on: object) -> float:
        began = time.thread_time()
        work(on)
        return time.thread_time() - began

    return spent_s


def contenders(
    files: ModelFiles, folder: Path, steps: Sequence[tuple[str, tuple[Pass, ...]]], features: Collection[str]
) -> Iterator[Contender]:
    """Sherpa-onnx, then each step of ours, on a CPU with these features."""
    options = settings.Model(language="en")
    yield Contender(STOCK, timed(SherpaRecognizer(files, options).recognize))
    fused = folder / "fused.onnx"
    inference.save_fused(files.model, fused)
    graph = onnx_file.read(fused)
    has_vnni = prepared.has_vnni(features)
    for number, (name, passes) in enumerate(steps):
        path: Path | None = None
        for each in passes:
            if each is not optimization.sign_weights or has_vnni:
                each(graph)
        if passes:
            path = folder / f"step{number}.onnx"
            onnx_file.write(graph, path)
        yield Contender(name, timed(OnnxRecognizer(files, options, path).recognize))


def funasr(python: str, bpe_model: Path, folder: Path) -> Contender:
    """funasr-onnx on the same graph, in a process of another interpreter."""
    if not (folder / "model_quant.onnx").exists():
        SenseVoice(lengths=True).save(folder / "model_quant.onnx")
    (folder / bpe_model.name).write_bytes(bpe_model.read_bytes())
    frontend = {"fs": 16000, "window": "hamming", "n_mels": 80, "frame_length": 25, "frame_shift": 10}
    (folder / "config.yaml").write_text(json.dumps({"frontend_conf": {**frontend, "lfr_m": 7, "lfr_n": 6}}))
    rows = ((name, value) for name, value in (("AddShift", "-8.0"), ("Rescale", "0.2")))
    text = "".join(f"<{name}> 560 560\n<LearnRateCoef> 0 [ {' '.join([value] * 560)} ]\n" for name, value in rows)
    (folder / "am.mvn").write_text(f"<Nnet>\n{text}</Nnet>\n")
    script = str(Path(__file__).with_name("bench_funasr.py"))
    process = subprocess.Popen(
        [python, script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
    )
    assert process.stdin is not None
    assert process.stdout is not None
    to, answers = process.stdin, process.stdout
    while answers.readline() != "ready\n":
        assert process.poll() is None, "funasr-onnx does not start"

    def decode(pcm: bytes) -> float:
        to.write(pcm.hex() + "\n")
        to.flush()
        return float(answers.readline())

    return Contender("funasr-onnx", decode)


def measured(taking_part: Sequence[Contender], lengths: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Medians of every contender at every length, and of the ratios to the first one in the same round."""
    rows = []
    for seconds in lengths:
        times: dict[str, list[float]] = {each.name: [] for each in taking_part}
        for round_number in range(rounds + 1):
            pcm = noise(seconds, round_number)
            for each in taking_part:
                spent = each.decode(pcm)
                if round_number:  # the first one warms up
                    times[each.name].append(spent)
        for name, spent_s in times.items():
            ratios = [ours / theirs for ours, theirs in zip(spent_s, times[taking_part[0].name], strict=True)]
            rows.append(
                {
                    "name": name,
                    "audio_s": seconds,
                    "cpu_ms": round(1000 * statistics.median(spent_s), 1),
                    "ratio_to_sherpa_stock": round(statistics.median(ratios), 3),
                }
            )
    return rows


def limits(files: ModelFiles) -> dict[str, float]:
    """What one core can do at most: multiply signed and unsigned weights that lie in its cache, read memory."""
    found: dict[str, float] = {}
    x = np.random.default_rng(0).standard_normal((171, 512), dtype=np.float32)
    for kind in (np.uint8, np.int8):
        multiply = timed(functools.partial(_product(kind).run, None))
        best_s = min(multiply({"x": x}) for _ in range(40))
        found[f"{kind.__name__}_gmac_per_s"] = round(171 * 512 * 2048 / best_s / 1e9)
    block = np.ones(256 << 17, np.int64)  # 256 MiB
    best_s = min(timed(np.max)(block) for _ in range(5))
    found["memory_gb_per_s"] = round(block.nbytes / best_s / 1e9, 1)
    graph = onnx_file.read(files.model)
    weights = sum(array.size for array in graph.constants.values() if array.dtype == np.uint8 and array.ndim == 2)
    return {**found, "mega_weights": round(weights / 1e6, 1)}


def _product(kind: type[np.uint8 | np.int8]) -> ort.InferenceSession:
    weight: NDArray[Any] = np.random.default_rng(0).integers(0, 100, (512, 2048)).astype(kind)
    inputs = ["x", "w", "scale", "zero"]
    constants = {"w": weight, "scale": np.float32(0.01), "zero": kind(3)}
    node = helper.make_node("DynamicQuantizeMatMul", inputs, ["y"], domain="com.microsoft")
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", 512])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def share_of_limit(row: dict[str, Any], most: dict[str, float]) -> float:
    """How much of a decode's time the core could not do without: multiplying, or reading all weights once."""
    frames = -(-(row["audio_s"] * 100 - 2) // 6) + 4
    product_s = most["mega_weights"] * 1e6 * frames / max(most["int8_gmac_per_s"], most["uint8_gmac_per_s"]) / 1e9
    reading_s = most["mega_weights"] * 1e6 / most["memory_gb_per_s"] / 1e9
    return float(1000 * max(product_s, reading_s) / row["cpu_ms"])


LOAD = """
import ctypes, json, sys, time
from pathlib import Path
from edge_asr import inference, model_store, settings
began, used = time.perf_counter(), time.process_time()
files = model_store.locate(sys.argv[1])
graph = Path(sys.argv[2]) if len(sys.argv) > 2 else None
if graph:
    model_store.sha256_of(graph)
recognizer = inference.OnnxRecognizer(files, settings.Model(), graph)
ready, used = time.perf_counter() - began, time.process_time() - used
ctypes.CDLL(None).malloc_trim(0)
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if "Rss" in line)
anonymous_mb = int(status["RssAnon"].split()[0]) // 1024
print(json.dumps({"ready_s": round(ready, 2), "cpu_s": round(used, 2), "anonymous_mb": anonymous_mb}))
"""


def loaded(files: ModelFiles, graph: Path | None) -> dict[str, Any]:
    """Time until a model is ready on a warm cache, hashes included, and the memory it keeps."""
    arguments = [f"{files.model.parent}/", *([str(graph)] if graph else [])]
    done = subprocess.run([sys.executable, "-c", LOAD, *arguments], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def machine(without: Collection[str] = ()) -> dict[str, Any]:
    """What it ran on, less what was hidden from it."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "features": sorted(prepared.cpu_features().difference(without)),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "onnxruntime": ort.__version__,
        "sherpa_onnx": _version("sherpa-onnx"),
    }


def _version(package: str) -> str:
    from importlib.metadata import version  # noqa: PLC0415 - for this line alone

    return version(package)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per contender, a column per length."""
    lengths = sorted({row["audio_s"] for row in rows})
    cells = {(row["name"], row["audio_s"]): row for row in rows}
    head = ["thread CPU ms (ratio)", *(f"{seconds} s" for seconds in lengths)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        found = [cells[name, seconds] for seconds in lengths]
        values = [f"{row['cpu_ms']:.0f} ({row['ratio_to_sherpa_stock']:.2f})" for row in found]
        lines.append("| " + " | ".join([name, *values]) + " |")
    return "\n".join(lines)


def machine_table(known: dict[str, Any]) -> str:
    """Markdown: a line for everything that is known of a machine."""
    cells = {name: " ".join(value) if isinstance(value, list) else value for name, value in known.items()}
    return "\n".join(["| machine | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells.items())])


def chart(rows: Sequence[dict[str, Any]]) -> str:
    """SVG: bars of the ratios, a group per length."""
    lengths, names = sorted({row["audio_s"] for row in rows}), list(dict.fromkeys(row["name"] for row in rows))
    bar, left, scale = 15, 230, 380
    height = len(lengths) * (len(names) * bar + 26) + 24
    shades = np.linspace(0xC0, 0x60, max(1, len(names)))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + scale + 90}" height="{height}">',
        "<style>text { font: 11px sans-serif }</style>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    y = 18
    for seconds in lengths:
        parts.append(f'<text x="8" y="{y}" font-weight="bold">{seconds} s of audio: CPU time, sherpa-onnx = 1</text>')
        y += 6
        for name, shade in zip(names, shades, strict=True):
            row = next(row for row in rows if (row["name"], row["audio_s"]) == (name, seconds))
            ratio = row["ratio_to_sherpa_stock"]
            colour = "#1f77b4" if name == OURS else f"rgb({int(shade)},{int(shade)},{int(shade)})"
            parts.append(f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{escape(name)}</text>')
            parts.append(
                f'<rect x="{left}" y="{y + 2}" width="{ratio * scale / 1.2:.0f}" height="{bar - 4}" fill="{colour}"/>'
            )
            parts.append(f'<text x="{left + ratio * scale / 1.2 + 5:.0f}" y="{y + 11}">{ratio:.2f}</text>')
            y += bar
        y += 20
    return "\n".join([*parts, "</svg>", ""])


def add_places(parser: argparse.ArgumentParser) -> None:
    """What every part that measures the full graph takes."""
    parser.add_argument("--model", type=Path, help="keep the model here, or use the one that is here")
    parser.add_argument("--json", type=Path, help="write the figures there")


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/bench engine", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="decodes of each contender and length")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 3, 10, 30], help="seconds of audio")
    parser.add_argument("--funasr", nargs=2, metavar=("PYTHON", "BPE_MODEL"), help="an interpreter with funasr-onnx")
    add_places(parser)
    parser.add_argument("--chart", type=Path, help="draw them there (SVG)")
    parser.add_argument(
        "--without", nargs="+", default=[], choices=cpu_mask.PLACES, metavar="FEATURE",
        help=f"measure as on a CPU that lacks some of {' '.join(cpu_mask.PLACES)}",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.without and not cpu_mask.is_in_force():
        raise SystemExit(_masked(arguments.without))
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        _run(arguments, Path(name))


def _masked(without: Collection[str]) -> int:
    """The same run in a process that does not find these instructions; its exit code."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        try:
            environment = cpu_mask.environment(without, Path(name))
        except cpu_mask.MaskError as error:
            raise SystemExit(f"tools/bench engine: {error}") from None
        command = [sys.executable, "-m", "tests.bench_engine", *sys.argv[1:]]
        return subprocess.run(command, check=False, env=environment).returncode


def _run(arguments: argparse.Namespace, folder: Path) -> None:
    features = prepared.cpu_features().difference(arguments.without)
    files = make_model(arguments.model or folder / "model")
    figures: dict[str, Any] = {"machine": machine(arguments.without)}
    taking_part = list(contenders(files, folder, STEPS, features))
    if arguments.funasr:
        python, bpe_model = arguments.funasr
        taking_part.append(funasr(python, Path(bpe_model), files.model.parent))
    figures["engine"] = measured(taking_part, arguments.lengths, arguments.rounds)
    last = max(folder.glob("step*.onnx"))
    taking_part.clear()
    figures["limits"] = most = limits(files)
    figures["load"] = {"the model's own graph": loaded(files, None), OURS: loaded(files, last)}
    for row in figures["engine"]:
        row["share_of_limit"] = round(share_of_limit(row, most), 2)
    print(table(figures["engine"]))
    print(json.dumps({part: figures[part] for part in ("machine", "limits", "load")}, indent=1))
    print({row["audio_s"]: row["share_of_limit"] for row in figures["engine"] if row["name"] == OURS})
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if arguments.chart:
        arguments.chart.write_text(chart(figures["engine"]), encoding="utf-8")


if __name__ == "__main__":
    main()
