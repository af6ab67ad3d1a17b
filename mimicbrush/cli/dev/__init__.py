"""Commands that repeat what comes with the project.

command      module        script
demo         demo          demo.py                   the whole way in a few minutes
data         data          small_model_data.py       the small model's data
encoders     encoders      train_small_encoders.py   the small model's frozen networks
ablations    ablations     ablations.py              the rows of the paper's Tables 3 and 4, small
sweep-table  sweep_table   sweep_table.py            the results of a sweep
"""
