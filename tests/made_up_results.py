"""Results of a comparison that never took place, for the tests of its table and its figures."""

from nanomla.comparison.table import Results


def made_up(losses: dict[str, list], **changes) -> Results:
    """
    Return results with these losses: name -> one for each seed, None where it failed.

    The first contender is the control. changes: other entries of the head.
    """
    head = dict(
        event='comparison',
        title='T',
        control=next(iter(losses)),
        seeds=[1, 2, 3],
        tune_seed=9,
        steps=100,
        tokens_per_step=64,
        source='a text',
        commit='abc1234',
        device='NVIDIA H200',
        dtype='bfloat16',
        torch='2.11',
        date='2026-01-31',
    )
    contenders = {}
    for number, name in enumerate(losses):
        contenders[name] = dict(
            name=name,
            label=name.upper(),
            kind='mla' if 'mla' in name else 'mha',
            params=1000,
            params_ratio=1.0,
            cache_bytes=512 >> number,
            error=None,
            differs={},
            grid={},
            tuned={},
            at_edge=False,
            decode=None,
        )
    runs = []
    for name, row in losses.items():
        for seed, loss in zip((1, 2, 3), row):
            runs.append(run_line(name, seed, loss))
    return Results(head | changes, contenders, runs)


def run_line(name: str, seed: int, loss: float | None) -> dict:
    line = dict(event='run', contender=name, role='seed', seed=seed, tuned={}, shared=False)
    if loss is None:
        return line | dict(error='the loss is nan')
    return line | dict(
        val_loss=loss,
        tok_per_s=1000 * seed,
        peak_memory=2**20 * seed,
        eval_steps=[50, 100],
        eval_losses=[loss + 1, loss],
    )
