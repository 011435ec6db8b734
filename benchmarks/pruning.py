"""What online pruning costs in quality, and what it gains in speed.

    python benchmarks/pruning.py [--bits 16 2.5 2.0] [--json FILE] [--plot FILE.svg]

Quality: perplexity and KL to the same model unpruned, against the fraction of expert activations dropped, for
    random       as many of the second experts, by chance
    published    w_1 / w_0 below the same quantile in every layer, the kept weight renormalised (MC-MoE, section 3.3)
    odp, otp     `mcmoe prune`
Rules are calibrated and evaluated on different text. The models are the reference model at 16 bits and quantised to
`--bits`, attention in 16 bits.

Speed: one MoE layer in the CPU kernel, rule included, against the same layer without a rule.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from cpu_moe import SHAPES, WIDTHS, Shape, quantised_variant, random_call, seconds

from vllm_mcmoe.calibration.evaluate.checkpoint_weights import open_weights
from vllm_mcmoe.calibration.evaluate.experts_forward import layer_rules
from vllm_mcmoe.calibration.evaluate.scores import evaluate
from vllm_mcmoe.calibration.model.description import MoeModel
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.text import load_calibration_data
from vllm_mcmoe.calibration.pipeline import quantize
from vllm_mcmoe.calibration.prune.costs import routed_tokens
from vllm_mcmoe.calibration.prune.odp import measure_curves, uniform_thresholds
from vllm_mcmoe.calibration.prune.otp import router_scores
from vllm_mcmoe.calibration.prune.rules import calibrate_rules, target_levels
from vllm_mcmoe.kernels.cpu import select_isa
from vllm_mcmoe.kernels.packing import GROUP_SIZE
from vllm_mcmoe.kernels.reference.pruning import by_weight, drop
from vllm_mcmoe.pruning import LayerPruning, PruningRules, interpolate, ratio_pruning

REFERENCE = Path(__file__).parent / "reference_model"
FRACTIONS = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5)
TOKENS = (1, 4, 16, 256)


@dataclass
class Quality:
    """One line of the table. pruned: of all expert activations, on the evaluation text."""

    bits: float
    rule: str
    target: float
    pruned: float
    perplexity: float
    perplexity_increase: float
    mean_kl: float


class RandomPruning(torch.nn.Module):
    """Drops a share of the experts after the first by chance."""

    def __init__(self, share: float):
        super().__init__()
        self.share, self.counts = share, torch.zeros(2, dtype=torch.int64)

    def forward(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = by_weight(topk_weights, topk_ids)
        keep = torch.rand(len(x), ids.shape[1] - 1) >= self.share
        return drop(weights, ids, keep, torch.tensor(0.0), self.counts)


class Rules:
    """All rules of one model, for any fraction."""

    def __init__(self, path: Path, options: argparse.Namespace):
        model = LayerwiseModel(open_weights(path))
        self.model: MoeModel = model.description
        text = load_calibration_data(self.model, options.calibration, options.sequences, options.length, print)
        calibrate = {"show_progress": False, "seed": options.seed}
        self.ours: dict[str, PruningRules] = {
            method: calibrate_rules(model, text.tokens, method, 0.25, **calibrate) for method in ("odp", "otp")
        }
        curves = {
            layer.name: measure_curves(layer, torch.tensor(1.0))
            for layer in routed_tokens(model, text.tokens, **calibrate)
        }
        self.levels = target_levels(self.model.top_k)
        self.published = uniform_thresholds(curves, self.levels, self.model.top_k)

    def layers(self, rule: str, target: float) -> Mapping[str, LayerPruning]:
        names = self.model.moe_layers.values()
        if rule == "random":
            torch.manual_seed(0)
            share = target * self.model.top_k / (self.model.top_k - 1)
            return dict.fromkeys(names, RandomPruning(share))
        if rule == "published":
            thresholds = {name: interpolate(self.published[name], self.levels, target) for name in names}
            return {
                name: ratio_pruning(thresholds[name], torch.tensor(1.0), self.model.num_experts, self.model.hidden)
                for name in names
            }
        return layer_rules(self.ours[rule], self.model, target)


def quality(path: Path, bits: float, options: argparse.Namespace) -> list[Quality]:
    rules, rows = Rules(path, options), []
    settings = {"sequences": options.evaluation_sequences, "length": options.length, "show_progress": False}
    unpruned = evaluate(path, options.evaluation, pruning="off", **settings).geometric_mean_perplexity
    print(f"\n### {bits:g} bits, unpruned perplexity {unpruned:.3f}\n")
    print("| rule | " + " | ".join(f"{fraction:.0%}" for fraction in FRACTIONS) + " |")
    print("|---" * (len(FRACTIONS) + 1) + "|")
    for rule in ("random", "published", "odp", "otp"):
        cells = []
        for target in FRACTIONS:
            layers = rules.layers(rule, target)
            found = evaluate(path, options.evaluation, against=path, pruning=layers, **settings)
            increase = found.geometric_mean_perplexity / unpruned - 1
            rows.append(
                Quality(bits, rule, target, found.pruned, found.geometric_mean_perplexity, increase, found.mean_kl)
            )
            cells.append(f"{increase:+.2%}, KL {found.mean_kl:.4f} ({found.pruned:.1%})")
        print(f"| {rule} | " + " | ".join(cells) + " |", flush=True)
    return rows


def plot(rows: list[Quality], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    models = sorted({row.bits for row in rows}, reverse=True)
    figure, axes = pyplot.subplots(1, len(models), figsize=(4 * len(models), 3.4), sharey=True, layout="constrained")
    for axis, bits in zip(axes if len(models) > 1 else [axes], models, strict=True):
        for rule in ("random", "published", "odp", "otp"):
            points = [row for row in rows if (row.bits, row.rule) == (bits, rule)]
            axis.semilogy([100 * p.pruned for p in points], [p.mean_kl for p in points], marker="o", label=rule)
        axis.set_title(f"{bits:g} bits")
        axis.set_xlabel("expert activations dropped, %")
        axis.grid(alpha=0.3)
    axis.legend()
    figure.supylabel("KL to unpruned, nats per token")
    figure.savefig(file)


@dataclass
class Speed:
    """speedup: median over rounds of the layer's time without a rule / with it."""

    tokens: int
    pruned: float
    speedup: float


def speed(shape: Shape, options: argparse.Namespace) -> list[Speed]:
    """The 2.5-bit mix, a mask router of random tensors in front of it; random tokens and routing."""
    variant = quantised_variant(shape, WIDTHS["2.5 bit mix"], select_isa(), stored_zeros=False)
    router = {
        "expert_bias": torch.zeros(shape.experts),
        "weight_slopes": torch.zeros(2, shape.top_k - 1),
        "projection": torch.randn(8, shape.hidden) * shape.hidden**-0.5,
        "expert_features": torch.randn(shape.experts, 8),
    }
    x, weights, ids = random_call(shape, 8192)
    scores = router_scores(x, *by_weight(weights, ids), router).flatten()
    share = shape.top_k / (shape.top_k - 1)
    rules = {}
    for fraction in (0.0, 0.1, 0.2, 0.3, 0.4):
        threshold = scores.quantile(fraction * share) if fraction else torch.tensor(-torch.inf)
        rule = LayerPruning(threshold.repeat(shape.top_k - 1), torch.tensor(0.2), router)
        rules[fraction] = rule.on_device(torch.device("cpu"), "cpu")
    results = []
    for tokens in TOKENS:
        calls = max(1, 32 // tokens)  # of a round: a single token has one expert or two
        times: dict[float | None, list[float]] = {fraction: [] for fraction in (None, *rules)}
        for number in range(options.rounds + 1):
            inputs = [random_call(shape, tokens) for _ in range(calls)]
            for fraction in times:
                rule = rules.get(fraction) if fraction is not None else None
                layer = variant.layers[number % len(variant.layers)]
                elapsed = seconds(lambda rule=rule, layer=layer, inputs=inputs: _run(layer, rule, inputs))
                if number:  # the first round warms up
                    times[fraction].append(elapsed)
        for fraction, rule in rules.items():
            ratio = statistics.median(a / b for a, b in zip(times[None], times[fraction], strict=True))
            seen, dropped = rule.counts.tolist()
            rule.counts.zero_()
            results.append(Speed(tokens, dropped / seen, ratio))
    return results


def _run(layer, rule: LayerPruning | None, inputs: list) -> None:
    for x, weights, ids in inputs:
        layer((x, *rule(x, weights, ids)) if rule is not None else (x, weights, ids))


def print_speed(name: str, results: list[Speed]) -> None:
    fractions = len(results) // len(TOKENS)
    print(f"\n### {name}: speed against no rule, 2.5-bit mix, {torch.get_num_threads()} threads\n")
    print("| tokens | " + " | ".join(f"{row.pruned:.0%}" for row in results[:fractions]) + " |")
    print("|---" * (fractions + 1) + "|")
    for start in range(0, len(results), fractions):
        row = results[start : start + fractions]
        print(f"| {row[0].tokens} | " + " | ".join(f"{cell.speedup:.2f}x" for cell in row) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REFERENCE / "tiny-mixtral")
    corpus = REFERENCE / "corpus"
    parser.add_argument("--calibration", type=Path, nargs="+", default=sorted(corpus.glob("*.calibration.txt")))
    parser.add_argument("--evaluation", type=Path, nargs="+", default=sorted(corpus.glob("*.evaluation.txt")))
    parser.add_argument("--bits", type=float, nargs="*", default=[16, 2.5, 2.0])
    parser.add_argument("--shape", choices=SHAPES, nargs="*", default=list(SHAPES), help="of the layers that are timed")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--evaluation-sequences", type=int, default=80)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15, help="of the timing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="an SVG of KL against the fraction dropped; needs matplotlib")
    options = parser.parse_args()
    rows: list[Quality] = []
    with tempfile.TemporaryDirectory() as directory:
        for bits in options.bits:
            path = options.model
            if bits != 16:
                path = Path(directory) / f"{bits}-bit"
                text = {"sequences": options.sequences, "length": options.length}
                quantize(options.model, path, options.calibration, bits=bits, linear_bits=16, tuned=False, **text)
            rows += quality(path, bits, options)
    if options.plot and rows:
        plot(rows, options.plot)
    timed: dict[str, list[Speed]] = {}
    for name in options.shape:
        shape = SHAPES[name]
        if name == "mixtral":  # a quarter of the intermediate size: several copies must fit into memory
            kept = shape.intermediate // 4 // GROUP_SIZE * GROUP_SIZE
            shape = Shape(shape.hidden, kept, shape.experts, shape.top_k)
        timed[name] = speed(shape, options)
        print_speed(name, timed[name])
    if options.json:
        document = {
            "quality": [asdict(row) for row in rows],
            "speed": {name: [asdict(row) for row in results] for name, results in timed.items()},
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
