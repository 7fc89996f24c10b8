"""Compiles every Triton kernel that ships for GPUs that are not here, and reads what came out.

    python -m quickchange_kernels.aot        a table, and exit status 1 where a kernel is unfit

    targets     what each GPU offers
    compiling   one configuration for one target, by Triton's compiler: no GPU, no driver
    inspection  registers, spills, memory, tensor-core instructions, from what the compiler wrote
    streams     how wide the loads on lines marked `# stream` became
    gate        what makes a kernel unfit
    report      the table
Knows no kernel by name: they say what they are through `compilations()`.
"""
