"""tune(): stage 2 of Song et al. 2025 (arXiv 2501.13669), from domain data and an importance file
to a plain PEFT adapter.

The story: refuse what cannot work, read the data, load the model, find its importance or record it
(record/cached.py), measure the bare base, add an adapter, train with TRL's SFTTrainer while the
penalty pulls, measure again, write.

    DIR/final/          the adapter (or model with --full), with the tokenizer; loads without
                        forgetless
    DIR/unscaled/       with --budget: the same as trained, before it was made to fit
    DIR/checkpoints/    the trainer's, for --resume
    DIR/resolved.yaml   the resolved options, valid as --config
    DIR/inputs.json     hashes of the data, which a resumed run must find unchanged
    DIR/run.json        configuration, environment, data, before, after, forgetting, learning,
                        moved, log

In several processes (torchrun, DDP) a step is the same --batch-size x --accumulation sequences as
in one: each process takes an equal part of them, and the first one writes.
"""

from __future__ import annotations

import time
from pathlib import Path

from forgetless.data.inputs import read_inputs
from forgetless.evaluate.evaluate import measure
from forgetless.evaluate.own_answers import has_template
from forgetless.files.lock import only_writer
from forgetless.files.schema import plain_of
from forgetless.files.untrusted import JsonObject
from forgetless.importance.recorded_on import check_recorded_text
from forgetless.model import distributed
from forgetless.model.loading import load_tokenizer
from forgetless.model.stages import Earlier
from forgetless.options.tune import TuneOptions
from forgetless.tune.adapted import adapt, announce, attach, let_go, rows_to_train
from forgetless.tune.base import (
    load_base,
    load_importance,
    measure_start,
    measured_on_own,
    with_strength,
)
from forgetless.tune.checks import check_one_domain, check_tuning
from forgetless.tune.result import (
    TrainedModel,
    finish,
    make_run,
    push_result,
    repository_of,
    write_result,
)
from forgetless.tune.rows import encode_inputs
from forgetless.tune.run_folder import (
    begin,
    check_folder,
    check_inputs,
    hashes_of_files,
    last_checkpoint,
)
from forgetless.tune.trainer import make_trainer, train_from


def tune(options: TuneOptions, *, earlier: Earlier | None = None) -> JsonObject:
    """Fine-tune as `options` say; writes `options.out` and returns what is in its run.json.

    With `earlier` the model stands on a sequence's earlier steps (sequence/sequence.py), and the
    adapter is relative to it. Raises ValueError or OptionError before training starts.
    """
    distributed.start(options.device)
    methods = check_tuning(options)
    check_one_domain(options, earlier)
    repository = repository_of(options)
    importance, file = load_importance(options)
    tokenizer = load_tokenizer(options)
    options = measured_on_own(options, tokenizer)
    options = with_strength(options, importance)
    out = Path(options.out)
    with only_writer(out):
        check_folder(options, out)
        inputs = read_inputs(options)
        hashes = {**inputs.hashes, **hashes_of_files(options, file)}
        if options.resume:
            check_inputs(hashes, out)
        check_recorded_text(options, importance, inputs.held_out.general)
        base = load_base(options, tokenizer, importance, file)
        options = with_strength(options, base.importance)
        rows = encode_inputs(options, inputs, base.model, tokenizer)
        start = measure_start(options, base, inputs, rows, earlier)

        started = time.perf_counter()
        rows = rows_to_train(start, methods, rows)
        adapted = adapt(start, methods)
        trainer = make_trainer(options, adapted.model, tokenizer, rows, adapted.optimizer)
        prepare_seconds = start.seconds + time.perf_counter() - started
        importance = attach(trainer, adapted, start)
        base, start = let_go(base, start, importance)

        announce(options, adapted.model, importance, base.file, len(rows.training))
        begin(options, hashes, out)
        train_seconds = train_from(trainer, last_checkpoint(out) if options.resume else None)

        trained = TrainedModel(adapted.model, trainer, start.setup, prepare_seconds, train_seconds)
        finished = finish(trained, methods, start.keeper)
        after = measure(adapted.model, tokenizer, inputs.held_out, own=start.own)
        behaved = None
        if start.asked is not None:
            behaved = start.asked.compared_with(adapted.model, tokenizer)
        run = make_run(
            start,
            trained,
            finished,
            after,
            behaved=behaved,
            methods=methods,
            inputs=inputs,
            rows=rows,
            file=base.file,
        )
        write_result(run, options, can_chat=has_template(tokenizer), part=earlier is not None)
    if repository is not None:
        push_result(repository, out / "final", run.verdict)
    return plain_of(run)
