"""k-NN and a linear classifier on frozen features, untrained beside trained. Run by hand:

    python tests/linear_probe.py runs/mae-FOLDER/checkpoint.pt

Features: the mean of the patch tokens of the un-augmented picture, standardised with the training
set's mean and deviation. Logistic regression by L-BFGS; its weight decay is chosen on a tenth of
the training set, never on the test set."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import mae


def fit(x, y, classes, weight_decay):
    """Weights (D + 1, classes) of the logistic regression on x (n, D + 1), labels y (n,)."""
    w = torch.zeros(x.shape[1], classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, history_size=10, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(x @ w, y) + weight_decay * w.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return w.detach()


def linear(train, y, test, z, classes):
    """Top-1 in percent on the test set, and the weight decay that a tenth of the training set chose."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (F.pad((x - mean) / std, (0, 1), value=1.0) for x in (train, test))
    held = torch.arange(len(train)) % 10 == 9
    score = lambda w, x, y: 100 * ((x @ w).argmax(1) == y).float().mean().item()
    decays = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]
    best = max(decays, key=lambda d: score(fit(train[~held], y[~held], classes, d), train[held], y[held]))
    return score(fit(train, y, classes, best), test, z), best


def main(path):
    state = torch.load(path, map_location="cpu", weights_only=True)
    cfg = mae.Config(**state["config"])
    data = common.open_data(cfg.data, cfg.data_root)
    trained = mae.build(cfg)
    trained.load_state_dict(state["model"])
    for name, model in (("untrained", mae.build(cfg)), ("trained", trained)):
        (x, y), (u, z) = (common.features(mae.mean_token(model), pictures, cfg.image_size, "cpu")
                          for pictures in (data.train, data.test))
        nearest = common.knn(x, y, u, z, len(data.classes))[0]
        accuracy, decay = linear(x, y, u, z, len(data.classes))
        print(f"{name:9} k-NN (k 20, all {len(x)} vote) {nearest:.1f} %, linear {accuracy:.1f} % (weight decay {decay:g})", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
