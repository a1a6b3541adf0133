"""Accuracy of base and pruned models on the same samples, compared in pairs; also without labels."""

from .compare import Paired as Paired
from .compare import compare as compare
from .data import Sample as Sample
from .data import Samples as Samples
from .data import find_samples as find_samples
from .images import evaluate_images as evaluate_images
from .journal import Journal as Journal
from .journal import JournalError as JournalError
from .loop import Failure as Failure
from .report import Report as Report
from .report import Summary as Summary
from .vqa import Question as Question
from .vqa import evaluate_vqa as evaluate_vqa
from .vqa import read_questions as read_questions
