"""ONNX: the operators of domain ``irq``, their bytes and bodies, and the data file beside a model.

``codes`` needs numpy alone, ``ops`` and ``operators`` need onnx-ir, ``model_file`` needs onnx. Import the
module that is meant: this package imports none of them.
"""
