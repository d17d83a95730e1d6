//! Segments, task state and where the interrupt table lies.

use core::arch::global_asm;

global_asm!(
    r#"
.pushsection .data.segments, "aw", @progbits
    .balign 16
.globl gdt
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff            # 08: 32-bit code, for the application processor's way in
    .quad 0x00af9b000000ffff            # 10: ring-0 code
    .quad 0x00cf93000000ffff            # 18: ring-0 data
    .quad 0
    .quad 0x00cff3000000ffff            # 2b: ring-3 data
    .quad 0x00affb000000ffff            # 33: ring-3 code
    .quad 0x000089000000026f, 0         # 38 and 48: task states; the base is filled in before ltr
    .quad 0x000089000000026f, 0
.globl gdt_pointer
gdt_pointer:
    .word 0x57
    .quad gdt
    .balign 16
.globl idt_pointer
idt_pointer:
    .word 0xfff
    .quad idt

    .balign 0x80                        # each is 0x280 bytes long
.globl tss
tss:
.macro task_state stack
    .long 0
    .quad \stack                        # stack for ring 0
    .skip 0x5a
    .word 0x68                          # the I/O bitmap: ports 0 to 0xfff are ring 3's
    .skip 0x200
    .byte 0xff
    .balign 0x80, 0
.endm
    task_state ring0_stacks + 4096
    task_state ring0_stacks + 8192
.popsection

.pushsection .noinit, "aw", @nobits
    .balign 4096
.globl ring0_stacks
ring0_stacks:
    .skip 8192
.popsection
"#,
    options(att_syntax)
);
