"""Gate that compiles every Triton kernel that ships, without a GPU, and judges the result.

    python -m quickchange_kernels.aot        a table, and exit status 1 where a kernel is unfit

    compiling    one configuration for one target, by Triton's compiler: no GPU, no driver
    inspection   registers, spills, memory, tensor-core instructions, from what the compiler wrote
    streams      widths of the loads on lines marked `# stream`
    gate         reasons why a kernel is unfit
    gate_report  the table
Knows no kernel by name: each module gives its configurations by `compilations()`.
"""
