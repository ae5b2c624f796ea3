/* Preloaded into a process, makes its processor look like one whose widest vectors are AVX2's.
 *
 * torch, oneDNN, MKL and ONNX Runtime choose kernels and layouts by the CPUID instruction; only the first three have
 * switches of their own. Linux can make that instruction fault (Intel, and some AMD), and the handler answers in its
 * place, without AVX-512, AMX and what came with them. Exits with 1 where the kernel or the processor cannot do that.
 */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

typedef int (*Sigaction)(int, const struct sigaction *, struct sigaction *);

static struct sigaction theirs; /* what the program wants done on a true segmentation fault */
static volatile int crashed;    /* from then on the signal is the program's own */

static long answer_cpuid(int allowed) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, allowed); }

static void on_fault(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)registers[REG_RIP];
    if (info->si_code != SI_KERNEL || code[0] != 0x0f || code[1] != 0xa2) {
        crashed = 1;
        ((Sigaction)dlsym(RTLD_NEXT, "sigaction"))(number, &theirs, 0); /* the fault comes again, to them */
        return;
    }
    unsigned leaf = registers[REG_RAX], part = registers[REG_RCX], a, b, c, d;
    answer_cpuid(1);
    __cpuid_count(leaf, part, a, b, c, d);
    answer_cpuid(0);
    if (leaf == 7 && part == 0) {
        b &= ~0xdc230000u; /* AVX-512 F, DQ, IFMA, PF, ER, CD, BW, VL */
        c &= ~0x00005f42u; /* AVX-512 VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ; GFNI, VAES, VPCLMULQDQ */
        d &= ~0x03c0010cu; /* AVX-512 4VNNIW, 4FMAPS, VP2INTERSECT, FP16; AMX */
    } else if (leaf == 7 || leaf == 0x1d || leaf == 0x1e || leaf == 0x24) {
        a = b = c = d = 0; /* AVX-VNNI, AVX512-BF16, AMX-FP16 and later ones; AMX's tiles; AVX10 */
    } else if (leaf == 0xd && part == 0) {
        a &= 7; /* of the registers' state: x87, SSE, AVX */
    }
    registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

/* Python's faulthandler asks for SIGSEGV too. It gets what is no CPUID. */
int sigaction(int number, const struct sigaction *wanted, struct sigaction *before) {
    if (number != SIGSEGV || crashed)
        return ((Sigaction)dlsym(RTLD_NEXT, "sigaction"))(number, wanted, before);
    if (before)
        *before = theirs;
    if (wanted)
        theirs = *wanted;
    return 0;
}

__attribute__((constructor)) static void start(void) {
    struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    ((Sigaction)dlsym(RTLD_NEXT, "sigaction"))(SIGSEGV, &ours, &theirs);
    if (answer_cpuid(0))
        _exit(1);
}
