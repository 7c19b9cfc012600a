"""python alone.py NAME ...: import each of these files by itself, and print which are loaded.

A model file's toy network sees a clip too, so that a download would show.
"""
import importlib
import sys

import torch

names = sys.argv[1:]
for name in names:
    for other in names:
        sys.modules.pop(other, None)
    module = importlib.import_module(name)
    print(*[other for other in names if other in sys.modules])

    if hasattr(module, "RECIPES"):
        recipe = module.RECIPES["toy"]
        network = module.build(recipe, 10).eval()
        network(torch.zeros(1, recipe["frames"], 3, 32, 32))
