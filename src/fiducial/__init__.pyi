"""The public names: what each is, for type checkers, and where it lives, for the loader of names in
`__init__.py`. A name is added here and nowhere else.
"""

from . import lab as lab
from . import losses as losses
from .core import advantages as advantages
from .core import kl as kl
from .errors import InputError as InputError
from .errors import RunError as RunError
from .methods.distill import distill as distill
from .methods.dpo import dpo as dpo
from .methods.grpo import grpo as grpo
from .methods.ppo import ppo as ppo
from .methods.prm import prm as prm
from .methods.reinforce import reinforce as reinforce
from .methods.reward_model import reward as reward
from .methods.settings.distill import Distill as Distill
from .methods.settings.dpo import DPO as DPO
from .methods.settings.grpo import GRPO as GRPO
from .methods.settings.ppo import PPO as PPO
from .methods.settings.prm import PRM as PRM
from .methods.settings.reinforce import Reinforce as Reinforce
from .methods.settings.reward_model import RewardModel as RewardModel
from .methods.settings.sft import SFT as SFT
from .methods.sft import sft as sft
from .models.roles import Policy as Policy
from .models.roles import Roles as Roles
from .rewards.types import Responses as Responses
from .rewards.types import Scored as Scored
from .rewards.types import Scorer as Scorer
from .rollout.local import local_sampler as local_sampler
from .rollout.sampling import Keys as Keys
from .rollout.sampling import Sampler as Sampler
from .rollout.sampling import SamplingParams as SamplingParams
from .rollout.trajectory import Segment as Segment
from .rollout.trajectory import Trajectory as Trajectory
from .run import Run as Run
from .use.collect import collect as collect
from .use.evaluate import evaluate as evaluate
from .use.generate import generate as generate
from .use.label_steps import label_steps as label_steps
from .use.settings import Collect as Collect
from .use.settings import Evaluate as Evaluate
from .use.settings import Generate as Generate
from .use.settings import LabelSteps as LabelSteps

__version__: str
