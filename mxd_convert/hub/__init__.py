"""Publish to the Hub and download from it. Beside `data` and `base` the only room that reaches the network."""

from mxd_convert.hub.listing import Listed, list_checkpoints
from mxd_convert.hub.loading import load, local_folder
from mxd_convert.hub.pulling import Pull, pull
from mxd_convert.hub.pushing import Push, check_account, push

__all__ = ["Listed", "Pull", "Push", "check_account", "list_checkpoints", "load", "local_folder", "pull", "push"]
