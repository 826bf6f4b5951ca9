"""Tokens per second, and what keeps them from being more."""

from .measure import PAPER_CASE, PAPER_PROMPT, Case, Figures, measure
from .models import Ours, Peer, random_network
from .report import Report

__all__ = ["PAPER_CASE", "PAPER_PROMPT", "Case", "Figures", "Ours", "Peer", "Report", "measure", "random_network"]
