"""Tests on a GPU, for where torch finds one; elsewhere they are not collected.

What is asked of a CPU in tests/compute is asked of it: the same bits split and joined, again, and after every resume.
"""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
