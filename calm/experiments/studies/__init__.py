"""The experiments, by name."""

from calm.experiments.experiment import Experiment
from calm.experiments.studies.autoencoder import AUTOENCODER
from calm.experiments.studies.domains import DOMAINS
from calm.experiments.studies.heads import HEADS
from calm.experiments.studies.input import INPUT
from calm.experiments.studies.latent import LATENT
from calm.experiments.studies.loss import LOSS
from calm.experiments.studies.metric import METRIC
from calm.experiments.studies.recipe import RECIPE
from calm.experiments.studies.scaling import SCALING
from calm.experiments.studies.start import START

__all__ = ["EXPERIMENTS"]

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        AUTOENCODER,
        HEADS,
        SCALING,
        LOSS,
        START,
        INPUT,
        METRIC,
        DOMAINS,
        RECIPE,
        LATENT,
    )
}
