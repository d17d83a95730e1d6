//! The way in: PVH entry or start-up IPI, long mode, ring 3. The only code, with `traps`, that runs in ring 0.
//!
//! Ring 0 may be emulated at a microsecond an instruction, so it is kept to what ring 3 cannot do.

use core::arch::global_asm;

/// Where the application processor starts in real mode: a page below 1 MiB that is free once the boot information is
/// copied.
pub const TRAMPOLINE: u64 = 0x8000;

global_asm!(
    r#"
.pushsection .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18                      # "Xen", an 8-byte value, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_start
.popsection

.pushsection .text.entry, "ax"
.code32
.globl pvh_start
pvh_start:                              # flat 32-bit mode, paging off, ebx = hvm_start_info
    cli
    cld
    rdtsc
    mov %eax, boot_tsc
    mov %edx, boot_tsc + 4
    mov %ebx, boot_start_info
    mov $0xff, %al                      # firmware may have left the timer ticking: mask both PICs
    out %al, $0x21
    out %al, $0xa1
    xor %edi, %edi                      # edi = number of this vCPU, from here to ring 3

enter_long_mode:
    mov $0x620, %eax                    # PAE, OSFXSR, OSXMMEXCPT
    mov %eax, %cr4
    mov $page_map, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx               # EFER.LME
    rdmsr
    or $0x100, %eax
    wrmsr
    mov $0x80010033, %eax               # PG, WP, NE, ET, MP, PE
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $0x10, $long_mode

.code64
long_mode:
    mov $0x18, %eax
    mov %eax, %ss
    mov $0x2b, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %fs
    mov %eax, %gs
    lidt idt_pointer

    imul $0x280, %edi, %eax             # this vCPU's TSS, into its descriptor in the GDT
    add $tss, %eax
    mov %edi, %esi
    shl $4, %esi
    mov %ax, gdt + 0x3a(%esi)
    shr $16, %eax
    mov %al, gdt + 0x3c(%esi)
    mov %ah, gdt + 0x3f(%esi)
    add $0x38, %esi
    ltr %si

    test %edi, %edi
    jnz 1f
    mov $0x40000000, %eax               # does KVM tell the frequency of the time-stamp counter?
    cpuid
    cmp $0x4b4d564b, %ebx
    jne 1f
    mov $0x40000001, %eax
    cpuid
    test $8, %al                        # KVM_FEATURE_CLOCKSOURCE2
    jz 1f
    mov $kvmclock_page + 1, %eax
    xor %edx, %edx
    mov $0x4b564d01, %ecx               # MSR_KVM_SYSTEM_TIME_NEW
    wrmsr
    xor %edi, %edi                      # cpuid and wrmsr leave it, but it costs nothing to be sure
1:
    lea 1(%rdi), %eax                   # this vCPU's ring-3 stack
    shl $17, %eax
    add $ring3_stacks, %eax
    mov %rax, %rsp                      # nothing is on it yet, so it also carries the way there
    pushq $0x2b
    push %rax
    pushq $0x3202                       # IOPL 3 and interrupts on; the TSS has an I/O bitmap for those who ignore IOPL
    pushq $0x33
    pushq $ring3_start
    iretq

ring3_start:
    mov %edi, %esi
    mov %edi, %eax                      # the page of this vCPU's ring-0 stack is there from now on: a busy workload takes its
    shl $12, %eax                       # first interrupt late, and what is a hole once it is ready should stay one
    movl $1, ring0_stacks(%rax)
    test %edi, %edi
    jnz 1f
    mov $bss_start, %edi                # loaders differ in whether they clear it
    mov $bss_end, %ecx
    sub %edi, %ecx
    xor %eax, %eax
    rep stosb
1:  mov %esi, %edi
    xor %ebp, %ebp
    call ring3_main
    ud2

.code16
.globl trampoline, trampoline_end
trampoline:                             # copied to 0x8000; real mode, cs = 0x800
    cli
    xor %ax, %ax
    mov %ax, %ds
    lgdtl 0x8000 + trampoline_gdt_pointer - trampoline
    mov %cr0, %eax
    or $1, %al
    mov %eax, %cr0
    ljmpl $0x08, $application_processor
trampoline_gdt_pointer:
    .word 0x57
    .long gdt
trampoline_end:

.code32
application_processor:
    mov $0x18, %eax
    mov %eax, %ds
    mov %eax, %ss
    mov $1, %edi
    jmp enter_long_mode
.code64
.popsection

.pushsection .noinit, "aw", @nobits
    .balign 4096
.globl kvmclock_page
kvmclock_page:
    .skip 4096
.globl boot_tsc, boot_start_info
boot_tsc:
    .skip 8
boot_start_info:
    .skip 8
    .balign 4096
ring3_stacks:
    .skip 2 * 0x20000
.popsection
"#,
    options(att_syntax)
);

/// Written once by the first instructions, before any Rust code runs.
mod boot {
    unsafe extern "C" {
        pub static boot_tsc: u64;
        pub static boot_start_info: u64;
        pub static kvmclock_page: u8;
        pub static trampoline: u8;
        pub static trampoline_end: u8;
    }
}

/// The time-stamp counter at the first instruction.
pub fn boot_tsc() -> u64 {
    // SAFETY: written before Rust code ran, never again.
    unsafe { boot::boot_tsc }
}

/// The address of the `hvm_start_info` that the loader passed.
pub fn start_info() -> u64 {
    // SAFETY: written before Rust code ran, never again. The upper half is not written.
    unsafe { boot::boot_start_info & 0xffff_ffff }
}

/// The page that KVM keeps this machine's `pvclock_vcpu_time_info` in, if there is a KVM.
pub fn kvmclock_page() -> *const u8 {
    &raw const boot::kvmclock_page
}

/// Copies the application processor's first instructions to [`TRAMPOLINE`].
pub fn install_trampoline() {
    let (start, end) = (&raw const boot::trampoline, &raw const boot::trampoline_end);
    // SAFETY: the page below 1 MiB is RAM and what the loader may have put there has been copied.
    unsafe { start.copy_to_nonoverlapping(TRAMPOLINE as *mut u8, end as usize - start as usize) };
}
