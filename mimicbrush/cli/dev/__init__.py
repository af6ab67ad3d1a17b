"""Commands that reproduce the results of the project, and one that prepares long training runs.

command       module        script
fetch-clips   fetch_clips   fetch_clips.py            the free clips of the project's list
demo          demo          demo.py                   the whole way in a few minutes
data          data          small_model_data.py       the small model's data
encoders      encoders      train_small_encoders.py   the small model's frozen networks
ablations     ablations     ablations.py              the rows of the paper's Tables 3 and 4, small
encode-views  encode_views  encode_views.py           fixed augmentations, encoded once, to train from
sweep-table   sweep_table   sweep_table.py            the results of a sweep
"""
