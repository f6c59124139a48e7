from .cluster import Cluster as Cluster
from .cluster import open_cluster as open_cluster
from .trainer import QuantumTrainer as QuantumTrainer
from .trainer import TrainingResult as TrainingResult
