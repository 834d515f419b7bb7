"""The shortest script for one training step of a timm model; `startup` runs it without the rest of this package."""

import json
import sys
import time

import timm
import torch

given = json.loads(sys.argv[1])
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
architecture = {"in_chans": given["channels"], "num_classes": given["num_classes"]}
if given["model_name"] == "simple_mlp":  # not in timm; two linear layers stand in for it
    width = given["channels"] * given["image_size"] ** 2
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(width, 512), torch.nn.Linear(512, given["num_classes"])
    )
else:
    model = timm.create_model(given["model_name"], **architecture)
model.to(device)
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
images = torch.randn(given["batch_size"], given["channels"], given["image_size"], given["image_size"], device=device)
labels = torch.randint(given["num_classes"], (given["batch_size"],), device=device)
torch.nn.functional.cross_entropy(model(images), labels).backward()
optimizer.step()
if device.type == "cuda":
    torch.cuda.synchronize()
with open(sys.argv[2], "w") as file:
    json.dump({"first_step_at": time.time()}, file)
