"""`sweep.json`: what the runs of a sweep found, written by `make_sweep` and read by `read_sweep`; this page is its schema.

Version 1 (paths are relative to the sweep's workdir):

    version    1
    config     the config file as it was given, with its variant
    sets       {set: what was measured there}, as in `result.json` (report/result.py); the same of all runs
    unpruned   {model: parameters, bytes, forward_flops, evaluation (scores, groups)}: the models that were pruned, by
               the folder that the config names. Usually one
    models     one object per evaluated model, in the order of the runs; and one for each run that has none yet

Of every object in `models`:

    name       unique: the run's name, for a model that is not its last one "RUN/pruned" or "RUN/reconstructed"
    run        the run, whose folder is runs/RUN
    group      the run's name without its seeds: what is equal here differs in seeds only
    labels     {label: value} that the run's name is made of: {"method": "depth", "decoder": "15", "recovery": "sft_l2"}
    overrides  {setting: value} of the run, as {"prune.method": "depth"}
    seed       the run's seed where it overrides any, and all are the same, else null
    status     "done"; "failed": it stopped with an error; "pending": it did not run yet, or runs elsewhere
    error      one line of a run that failed, else null

Of those that are done also:

    model            the folder of the model that was pruned, a key of `unpruned`
    method           "depth", "width" or "hybrid"
    criterion        what the plan was made by
    ratio_asked      share of all parameters to remove (null: layers or a budget were asked for); ratio_reached
    decoder_ratio    share of the decoder's parameters that went
    parameters       of this model
    bytes            of its folder's files
    forward_flops    of a prompt of `prune.budget.context` tokens (at most what the model has positions for) with
                     `prune.budget.images` images
    reconstruct      "none" or "least_squares": whether weights of this model were solved for, before any training
    recovery         "none" where nothing was trained, or the name of the recovery (`recover.name`)
    data_fraction    share of the training records that were trained on, 0.0 where nothing was trained
    seconds          of scoring, pruning, reconstruction and training, by whichever run of the sweep did it
    evaluation_seconds
    evaluation       scores, retained, retained_interval, mean_of_ratios, paper_average, groups: as in `result.json`
    training_records, training_steps   where something was trained
    prefill_tokens_per_second, decode_tokens_per_second   where they were measured
    digest           of the folder's content: equal of equal models
    path             the folder

A model that several runs have in common before their last step is listed once, under the first of them. `sweep.csv` is
the same, flat: a line per object, `SET.score`, `SET.retained`, `SET.low` and `SET.high` of every set.
"""
