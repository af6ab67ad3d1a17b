"""The commands. Each reads its arguments, calls the other packages, and prints a message.

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
    convert     convert        convert_checkpoint.py  weights from and to other formats
    evaluate    evaluate       evaluate.py            held-out pairs, or a benchmark
    benchmark   benchmark      build_benchmark.py     images and videos -> a benchmark
    pck         pck            pck.py                 keypoint transfer
    study       study          user_study.py          a blind user study

``dev/`` has the commands that reproduce the results of the project. ``project_files`` finds the files of
the commands: configs and lists of data. Only train, mine and evaluate import Hydra outside of
`mimicbrush.assembly`: it reads their command lines.
"""
