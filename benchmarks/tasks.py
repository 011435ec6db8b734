"""What quantisation costs on tasks: lm-evaluation-harness against `vllm serve`, the original first, then checkpoints.

    pip install 'lm_eval[api]'                # beside vLLM
    python benchmarks/tasks.py ORIGINAL CHECKPOINT... --work DIR [--tasks mcmoe_recall] [--limit 50] [--json FILE]

Each model is served in turn, and asked over HTTP as any client would; tasks are those of benchmarks/lm_eval unless
--tasks names others that lm_eval knows. A row has bytes on disk of all tensors, and for each task the share of right
answers with its standard error; beside a checkpoint's the difference to the original on the same items, with the
standard error of that difference, which is the smaller one: a model mostly fails where the original does.

lm_eval's own files, every answer among them, and the servers' logs are kept in --work, by the name of a model's
directory. It is asked only the tasks that it has not been asked there: another folder is for another checkpoint of the
same name, and for other --serve-options.
"""

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_mcmoe.local_server import serve

ROOT = Path(__file__).parents[1]
TASKS = ("mcmoe_continuations", "mcmoe_countries", "mcmoe_copying", "mcmoe_recall")
# Of a task's metrics the first there is: greedy text that is right; the likeliest choice per character, of tasks whose
# choices differ in length; the likeliest choice
METRICS = ("exact_match", "acc_norm", "acc")
LENGTH = 512  # no item of these tasks has as many tokens
CONCURRENT = 8
LM_EVAL = Path(sys.executable).with_name("lm_eval")


@dataclass(frozen=True)
class Score:
    """Of one model on one task. difference, difference_error: to the original on the same items, None of itself."""

    task: str
    items: int
    accuracy: float
    error: float
    difference: float | None = None
    difference_error: float | None = None


def main() -> None:
    options = _arguments()
    original: dict[str, dict[int, float]] = {}
    rows = []
    _show(("model", "bytes", *options.tasks))
    _show(("---", "---:", *("---:" for _ in options.tasks)))
    for model in options.models:
        answers = read_answers(model, options)
        original = original or answers
        scores = [score(task, answers[task], original[task]) for task in options.tasks]
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        _show((model.name, f"{size:,}", *map(_cell, scores)))
        rows.append({"model": model.name, "bytes": size, "scores": [asdict(score) for score in scores]})
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")


def read_answers(model: Path, options: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Task -> number of the item -> 1 where the model is right, else 0; asks the model unless that has been done."""
    out = options.work / (model.name if options.limit is None else f"{model.name}-{options.limit}")
    missing = [task for task in options.tasks if not _samples(out, task)]
    if missing:
        out.mkdir(parents=True, exist_ok=True)
        ask(model, out, missing, options)
    found = {task: _samples(out, task) for task in options.tasks}
    for task, files in found.items():
        if not files:  # lm_eval writes a group's answers by the names of its tasks
            sys.exit(f"{out}: lm_eval has written no answers to {task}; give single tasks, not groups or tags of them")
    return {task: _right(files[-1]) for task, files in found.items()}


def _samples(out: Path, task: str) -> list[Path]:
    """lm_eval's files of answers, oldest first: a date follows the task's name, and none of a longer name."""
    return sorted(out.glob(f"**/samples_{task}_[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]T*.jsonl"))


def ask(model: Path, out: Path, tasks: list[str], options: argparse.Namespace) -> None:
    """Serve the model, and let lm_eval ask it these tasks."""
    server = ("--max-model-len", str(LENGTH), "--max-num-seqs", str(2 * CONCURRENT), *options.serve_options)
    with serve(model, server, log_file=out / "server.log") as url:
        settings = {
            "model": model,
            "tokenizer": model,
            "tokenizer_backend": "huggingface",
            "base_url": f"{url}/completions",
            "num_concurrent": CONCURRENT,
            "max_length": LENGTH,
        }
        command = [str(LM_EVAL), "--model", "local-completions"]
        command += ["--model_args", ",".join(f"{name}={value}" for name, value in settings.items())]
        command += ["--include_path", "benchmarks/lm_eval", "--tasks", ",".join(tasks)]
        command += ["--output_path", str(out.resolve()), "--log_samples"]
        command += ["--limit", str(options.limit)] if options.limit else []
        with open(out / "lm_eval.log", "wb") as log:
            process = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if process.returncode != 0:
        sys.exit(f"`{' '.join(command)}` ended with {process.returncode}: {out / 'lm_eval.log'}")


def _right(samples: Path) -> dict[int, float]:
    """Of lm_eval's file with a task's answers."""
    items = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    metric = next(name for name in METRICS if name in items[0])
    return {item["doc_id"]: float(item[metric]) for item in items}


def score(task: str, answers: dict[int, float], original: dict[int, float]) -> Score:
    """Raises ValueError where the two were not asked the same items."""
    if answers.keys() != original.keys():
        raise ValueError(f"{task}: {len(answers)} items were asked, and others of the original, {len(original)}")
    accuracy, error = _mean_and_error(list(answers.values()))
    if answers is original:
        return Score(task, len(answers), accuracy, error)
    difference = _mean_and_error([answers[item] - original[item] for item in original])
    return Score(task, len(answers), accuracy, error, *difference)


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    """A mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def _cell(score: Score) -> str:
    shown = f"{score.accuracy:.1%} ± {score.error:.1%}"
    if score.difference is None:
        return shown
    return f"{shown} ({score.difference:+.1%} ± {score.difference_error:.1%})"


def _show(cells: tuple[str, ...]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models",
        type=lambda path: Path(path).resolve(),
        nargs="+",
        metavar="MODEL",
        help="directories, the original first",
    )
    parser.add_argument("--work", type=Path, required=True, help="where answers and logs are kept")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="of benchmarks/lm_eval, or of lm_eval itself")
    parser.add_argument("--limit", type=int, help="items of each task, two or more; all of them without")
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    parser.add_argument(
        "--serve-options", type=shlex.split, default=["--enforce-eager"], help="of vllm serve: (--enforce-eager)"
    )
    options = parser.parse_args()
    if options.limit is not None and options.limit < 2:
        parser.error("--limit is two or more: one answer has no standard error")
    if not LM_EVAL.exists():
        parser.error(f"there is no {LM_EVAL}: pip install 'lm_eval[api]'")
    if len({model.name for model in options.models}) < len(options.models):
        parser.error("models whose directories have the same name cannot be told apart in the table")
    return options


if __name__ == "__main__":
    main()
