"""The training loop: restore, step, log, evaluate, save."""

from pathlib import Path
from typing import Any

from effdet_jax import evaluate
from effdet_jax.build import build_run
from effdet_jax.records.console import info, result
from effdet_jax.records.metrics import read_metrics
from effdet_jax.runtime import devices
from effdet_jax.runtime.signals import notices
from effdet_jax.training.bookkeeping import bookkeeping
from effdet_jax.training.run import resumed


def train_and_evaluate(config: Any, workdir: str | Path) -> dict[str, float]:
    """Trains the model of `config` in `workdir`, or continues its run there.

    Returns the metrics of the last evaluation, or {} after SIGTERM or SIGINT, which finish the step and save.

    Raises:
      UserError: for anything in the config, the data or the work directory that the user can fix.
    """
    workdir = Path(workdir)
    run = build_run(config, workdir)
    timetable = run.timetable
    info(f'{run.name}: {timetable.total_steps} steps of {run.data.batch_size} images on {devices.describe_devices()}')
    metrics, results, stops = {}, {}, False
    with resumed(run) as state, bookkeeping(run) as books, notices() as stop_is_asked:
        for step in range(run.first_step + 1, timetable.total_steps + 1):
            batch = books.next_batch()
            frozen = step - 1 < timetable.unfreeze_step
            state, step_metrics = run.train_step(state, devices.shard(batch), frozen)
            books.add(step, step_metrics, batch)

            stops = stop_is_asked(step)
            evaluates, saves = step in timetable.evaluations, step in timetable.saves or stops
            # Also before every save, so that no mean spans a restart and a continued run logs the same numbers.
            if step % timetable.log_interval == 0 or saves:
                books.log(step)
            if evaluates:
                metrics, results = run.evaluate(state.best_variables)
                pictures = evaluate.draw(run.data.eval_source, results, run.records.num_pictures)
                books.log_evaluation(step, metrics, pictures)
            if saves:
                books.save(step, state, metrics if evaluates else None)
            if stops:
                break
    if stops and step < timetable.total_steps:
        done = f'stopped at step {step} of {timetable.total_steps}'
        info(f'{done}, all saved in {workdir}: the same command continues it')
        return {}
    if results and devices.is_first_host():
        from effdet_jax import reporting  # only now: matplotlib takes a second to load

        reporting.write_after_training(config, workdir, run.data.eval_source, timetable.total_steps, metrics, results)
    return metrics or _last_evaluation(workdir)


def _last_evaluation(workdir: Path) -> dict[str, float]:
    """The logged metrics of the last evaluation, for a run that was already complete."""
    rows = [row for row in read_metrics(workdir / 'metrics.jsonl') if 'eval/AP' in row]
    last = rows[-1] if rows else {}
    return {name.removeprefix('eval/'): value for name, value in last.items() if name != 'step'}


def print_summary(metrics: dict[str, float], workdir: Path) -> None:
    """Prints the final tables of a run."""
    classes = [name.removeprefix('AP/') for name in metrics if name.startswith('AP/')]
    result('\n' + evaluate.summary(metrics, tuple(classes)))
    info(f'\n{workdir}: report.html  config.json  metrics.jsonl  checkpoints/  tensorboard/  pictures/')
