#!/usr/bin/env bash
# peft 0.21.2: a name in target_modules reaches every module whose path ends with it, also outside of the layers.
#
# LLaDA and MMaDA call the last matrix of each MLP `ff_out`, and the head, too: `transformer.blocks.0.ff_out` and
# `transformer.ff_out`. With target_modules=["ff_out"] PEFT adapts both, without a word. At MMaDA's size the
# adapter of the head has eight times as many parameters as that of a layer, since a factor of it has 134,656
# rows. A regular expression (a string in the place of the list) that names the blocks adapts what was meant.
# (`mmada convert to-peft` writes such an expression; tests compare the logits.)
#
# Output seen:
#   ["ff_out"]:             transformer.blocks.0.ff_out transformer.ff_out
#   ".*blocks.*\.ff_out":   transformer.blocks.0.ff_out
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 torch==2.13.0 transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from peft import LoraConfig, inject_adapter_in_model


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.ff_out = torch.nn.Linear(8, 4)


class Transformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block()])
        self.ff_out = torch.nn.Linear(4, 16)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = Transformer()


def adapted(targets):
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), Model())
    return sorted(name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A"))


by_name, by_pattern = adapted(["ff_out"]), adapted(r".*blocks.*\.ff_out")
print('["ff_out"]:            ', *by_name)
print('".*blocks.*\\.ff_out":  ', *by_pattern)
layer, head = "transformer.blocks.0.ff_out", "transformer.ff_out"
sys.exit((by_name, by_pattern) != ([layer, head], [layer]))
PYTHON
