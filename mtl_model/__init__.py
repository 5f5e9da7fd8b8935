"""The multi-task network in plain PyTorch, independent of Flower.

Letters used for tensor shapes throughout the package:
    B  batch size (examples)        C  channels
    H  height, W  width (pixels)    N  tokens per window (w * w)
    M  mask classes                 K  image classes
"""
