"""Small networks to train or to distil into: plain PyTorch, one self-contained file for each family.

Every operator has an int8 form in the quantiser, batch norms follow convolutions (the converter
folds them), channels are multiples of 8. Each file has
``build(*, width, num_classes, in_channels, size)`` and imports only torch, so that it can be copied
into the artifact of a model that was made from it.

``size`` is (height, width) of images and spectrograms (N, C, H, W), or (length,) of series (N, C, L),
such as those of motion sensors. ``edgepipe.students`` lists what there is.
"""
