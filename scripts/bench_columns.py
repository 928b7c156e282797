"""Softmax over an axis before the last, against torch, onnxruntime and this compiler's softmax over the last axis."""

from __future__ import annotations
