"""ControlNet on Fashion-MNIST: a trained U-Net, controlled by edges and by a coarse mask.

apt-get install dataset-fashion-mnist    # on Debian; or the four idx .gz files from anywhere
# two hours on a CPU
python -m experiments.controlnet --data-dir /usr/share/datasets/fashion-mnist
"""
