"""The commands: arguments in, the rooms called, a message out.

Each module has a ``main()``. ``mimicbrush COMMAND`` (`mimicbrush.__main__`) and the file in ``scripts/`` both run it.

    command     module         script
    edit        edit           infer.py               edit an image, or many
    app         app            app.py                 edit in the browser
    paint       paint          paint_masks.py         paint masks in the browser
    mine        mine           mine_pairs.py          videos and photographs -> pairs
    pairs       pairs          pairs.py               check, export and report a mined folder
    fetch       fetch          fetch_weights.py       fetch and check starting weights
    train       train          train.py               train a model, or a sweep of them
    export      export         export_run.py          a checkpoint -> a pipeline folder
    convert     convert        convert_checkpoint.py  released checkpoints in and out
    evaluate    evaluate       evaluate.py            held-out pairs, or a benchmark
    benchmark   benchmark      build_benchmark.py     images and videos -> a benchmark
    pck         pck            pck.py                 keypoint transfer
    study       study          user_study.py          a blind user study

``dev/`` has the commands that repeat what comes with the project. ``project_files`` finds what belongs
to the commands: configs, lists of data. The modules of train, mine and evaluate are the only ones outside of
`mimicbrush.assembly` that import Hydra: it reads their command lines.
"""
