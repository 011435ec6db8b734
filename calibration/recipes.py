"""Recipes: everything that decides how a model is quantised, fixed under a name.

mcmoe       the default: predicted loss increase, one budget for the whole model, GPTQ with refinement
paper-code  what the authors' published code does (PMQ, arXiv 2410.06270), including where it differs from the paper
uniform     the baseline: the same width everywhere, standard GPTQ
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from vllm_mcmoe.calibration.matrix.gptq import GPTQOptions
from vllm_mcmoe.calibration.matrix.grids import Metadata
from vllm_mcmoe.checkpoint import TRELLIS_VERSION
from vllm_mcmoe.errors import PlanError
from vllm_mcmoe.kernels.packing import KINDS, Kind

Objective = Literal["loss_increase", "weighted_error", "uniform"]
Budget = Literal["<=", "="]
Scope = Literal["layer", "model"]
Granularity = Literal["expert", "projection"]
ErrorQuantizer = Literal["rtn", "gptq"]
HessianWeighting = Literal["none", "routing", "gradient"]
Effort = Literal["fast", "normal", "best"]


# What each version of the checkpoint format stores of a group: GPTQOptions.metadata.
METADATA: Mapping[int, Metadata] = MappingProxyType({1: "float16", 2: "float8", 3: "float8"})


@dataclass(frozen=True)
class TuningOptions:
    """How norms are tuned after quantisation (tune/tuning.py).

    tokens     of calibration that are used, at most, whole sequences
    steps      of Adam in one pass over them, each on as many of the sequences
    passes     over them
    step_size  of the first step, as a share of the root mean square of what a norm multiplies by, at a KL of 1 nat per
               token: what it takes to make up for an error grows with its square root
    """

    tokens: int = 65536
    steps: int = 16
    passes: int = 1
    step_size: float = 0.05


@dataclass(frozen=True)
class Recipe:
    """How a model is quantised.

    widths             bit-widths an expert may get
    objective          what allocation minimises:
                       "loss_increase": the sum of factors.loss_increase over every quantised projection;
                       "weighted_error": sum of frequency^alpha * routing weight^beta * error^gamma (docs/method.md);
                       "uniform": nothing, every expert gets the same width
    alpha, beta, gamma exponents of "weighted_error"
    normalise          divide the three factors of "weighted_error" by their sums over the layer; decides nothing
                       inside one layer, makes layers comparable under scope "model"
    budget             whether the budget may be left partly unspent ("<=") or must be met exactly ("=")
    scope              one budget per layer, or one for the whole model
    granularity        one width per expert, or one each for its gate_up and its down projection
    minimum_counts     width -> least number of experts per layer that get it
    keep_super_experts hold super experts at the largest width
    error_quantizer    quantiser the factors are measured with
    measured_rows      rows of a matrix (of a gated expert's gate and up each) the factors are measured on; None, all
    measured_tokens    calibration tokens the factors and loss gradients are measured on, whole sequences; None, all
    gptq               how the weights are quantised in the end
    hessian_weighting  weight of each token in an expert's Hessian: "none" 1, "routing" the squared routing weight,
                       "gradient" the squared routing weight times the squared norm of the loss gradient at the
                       layer's output
    bfloat16_products  let matrix products round their operands to bfloat16 where that is faster
    linear_bits        width of attention and shared-expert linears: 4, 8 or 16
    tuning             of norms, after everything is quantised; None leaves them as they are
    """

    name: str
    widths: tuple[int, ...]
    objective: Objective
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    normalise: bool = True
    budget: Budget = "<="
    scope: Scope = "layer"
    granularity: Granularity = "expert"
    minimum_counts: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    keep_super_experts: bool = False
    error_quantizer: ErrorQuantizer = "gptq"
    measured_rows: int | None = None
    measured_tokens: int | None = None
    gptq: GPTQOptions = field(default_factory=GPTQOptions)
    hessian_weighting: HessianWeighting = "none"
    bfloat16_products: bool = False
    linear_bits: int = 4
    tuning: TuningOptions | None = None

    @property
    def format_version(self) -> int:
        """Of the checkpoints it makes."""
        if self.gptq.codes == "trellis":
            return TRELLIS_VERSION
        return next(version for version, metadata in METADATA.items() if metadata == self.gptq.metadata)


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        # Chosen on the reference model. Proxy losses below are means over 8 matrices, relative to tr(W H W^T); plain
        # GPTQ has 0.0901 at 1 bit and 0.0101 at 2, the authors' 0.1171 and 0.0174, round-to-nearest 0.187 and 0.035.
        "mcmoe": Recipe(
            name="mcmoe",
            widths=(1, 2, 3, 4),
            # KL at 1.965 written bits: 0.0355; a uniform plan 0.0655, per-layer budgets 0.0458, whole experts 0.0494.
            objective="loss_increase",
            scope="model",
            granularity="projection",
            keep_super_experts=True,
            # 1 bit: 0.0381 / 0.0352 / 0.0341 / 0.0339 after 2 / 4 / 8 / 32 sweeps, 0.0346 after 8 without act order.
            # KL at 1.965 bits: 0.0588 / 0.0355 / 0.0344 after 2 / 8 / 30 sweeps, 0.2273 with plain GPTQ. (These sweeps
            # refitted all grids, then all codes. Group by group, as now, gives 0.0338 against 0.0340 at 2.0 bits, in
            # half the time. Measuring the widths with 1 sweep instead of 8 gives 0.0426.)
            # Sweeps under the outputs' Hessian: KL at 2 bits everywhere 0.0343 / 0.0268 / 0.0257 / 0.0262 after
            # 0 / 4 / 8 / 16 (benchmarks/output_hessian.py).
            # Those are of scalar codes. Trellis codes: 0.0181 for 0.0280 at 2 bits everywhere, 0.0047 for 0.0072 at 3
            # (docs/trellis.md).
            gptq=GPTQOptions(act_order=True, refinement_sweeps=8, output_sweeps=8, metadata="float8", codes="trellis"),
            # KL and perplexity at 1.965 bits: 0.0355 and 28.64; "gradient" 0.0381 and 28.74, "none" 0.0352 and 28.83.
            hessian_weighting="routing",
            tuning=TuningOptions(),
        ),
        "paper-code": Recipe(  # docs/method.md, section 2: reproduces the authors' published allocations
            name="paper-code",
            widths=(1, 2, 3),
            objective="weighted_error",
            beta=1.5,
            minimum_counts=MappingProxyType({3: 1, 2: 1}),
            error_quantizer="rtn",
            gptq=GPTQOptions(compensate_within_block=False),
        ),
        "uniform": Recipe(name="uniform", widths=(1, 2, 3, 4, 8), objective="uniform"),
    }
)


# What widths are measured on: rows of matrices that have more than twice as many, and tokens (docs/method.md, Effort).
MEASURED_ROWS: Mapping[Effort, int | None] = MappingProxyType({"fast": 128, "normal": 256, "best": None})
MEASURED_TOKENS: Mapping[Effort, int | None] = MappingProxyType({"fast": 16384, "normal": 65536, "best": None})
# Most sweeps of both kinds, and of those before the ones under the outputs' Hessian, which make no difference then. KL
# after 8 / 4 / 2 before: at 2 bits everywhere 0.0280 / 0.0275 / 0.0280, with trellis codes 0.0181 / 0.0186 / 0.0188;
# with these at 1 bit 0.1259 / 0.1251 / 0.1265, at 3 bits 0.0047 / 0.0045 / 0.0048 (benchmarks/output_hessian.py
# --before 8 4 2 --only-with). Planned for 1.94 bits, with them, 0.0182 / 0.0174 after 8 / 4 (benchmarks/effort.py).
FAST_SWEEPS, NORMAL_SWEEPS_BEFORE = 2, 4


def find_recipe(
    recipe: str | Recipe, effort: Effort = "normal", *, tune: bool = True, codes: Kind | None = None
) -> Recipe:
    """The recipe of that name, with as much effort, or the given one as it is; without its tuning unless `tune`.

    codes: in the place of the recipe's. Raises ValueError naming the known recipes, efforts or codes, and PlanError for
    codes that the recipe cannot have.
    """
    found = recipe if isinstance(recipe, Recipe) else _named(recipe, effort)
    if codes is not None:
        _check_known("codes", codes, KINDS)
        if codes == "trellis" and found.gptq.metadata != "float8":
            raise PlanError(
                f"recipe {found.name} has scalar codes alone: trellis codes have no zeros, which it stores."
            )
        found = replace(found, gptq=replace(found.gptq, codes=codes))
    return found if tune else replace(found, tuning=None)


def _check_known(kind: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(f"{kind} {name!r} is not one of {', '.join(known)}")


def _named(recipe: str, effort: Effort) -> Recipe:
    _check_known("recipe", recipe, RECIPES)
    _check_known("effort", effort, MEASURED_ROWS)
    found = RECIPES[recipe]
    if found.objective == "loss_increase":  # what the authors' code measures is quick, and compared as it is
        found = replace(
            found,
            measured_rows=MEASURED_ROWS[effort],
            measured_tokens=MEASURED_TOKENS[effort],
            bfloat16_products=effort != "best",
        )
    gptq = found.gptq
    if effort == "normal" and gptq.output_sweeps:
        before = min(gptq.refinement_sweeps, NORMAL_SWEEPS_BEFORE)
        found = replace(found, gptq=replace(gptq, refinement_sweeps=before))
    if effort == "fast":
        fewer = {name: min(getattr(gptq, name), FAST_SWEEPS) for name in ("refinement_sweeps", "output_sweeps")}
        found = replace(found, gptq=replace(gptq, **fewer), tuning=None)
    return found


def needs_gradients(recipe: Recipe) -> bool:
    """Whether measuring runs the model backwards, too."""
    return recipe.objective == "loss_increase" or needs_gradients_to_quantize(recipe)


def needs_gradients_to_quantize(recipe: Recipe) -> bool:
    """Whether quantising takes loss gradients, so that the model runs backwards where a plan is given, too."""
    return recipe.hessian_weighting == "gradient" or needs_output_gradients(recipe)


def needs_output_gradients(recipe: Recipe) -> bool:
    return recipe.gptq.output_sweeps > 0
