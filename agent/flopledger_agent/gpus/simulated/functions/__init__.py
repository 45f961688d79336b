"""The NVML functions of the simulated driver, one module per subject.

Each module maps NVML names to Python functions. A device function takes the device, the instant
and the C arguments after the handle; a system function takes the driver and all C arguments. Both
return an NVML code and write results only through the caller's pointers. A name that is in no
module does not exist in this driver, and pynvml says FUNCTION_NOT_FOUND.
"""
