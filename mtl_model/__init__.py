"""The multi-task network: plain PyTorch, no Flower, no files.

Letters used in every shape of this room:
    B  examples of a batch          C  channels of a map
    H  rows, W  columns             N  tokens of a window (w * w)
    M  mask classes                 K  image classes
"""
