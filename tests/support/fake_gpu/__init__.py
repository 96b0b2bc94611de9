"""A pretended GPU for machines without one: tensors of device ``cuda`` have a shape, a dtype and no values.

``build`` compiles the few lines of C++ that a CPU build of torch lacks, ``gpu`` is the device, ``plugin`` brings both
into a pytest process (torch must not be imported before). Tensors on the host stay real, so everything that is not a
network runs as it is; what comes back from the device is a constant. What this cannot show: values, what kernels
refuse, DeepSpeed, NCCL, and time.
"""
