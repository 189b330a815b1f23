/* Preloaded, it lets CPUID say that some instructions are not there: CPU_MASK lists "leaf,subleaf,register,bit" (hex and
   decimal, register 0 to 3 for eax to edx), parted by spaces. Linux lets CPUID fault where the CPU can (arch_prctl(2),
   ARCH_SET_CPUID); the fault is answered with what the CPU says, less the bits of the list. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { ARCH_SET_CPUID = 0x1012, MOST = 32 };

static struct {
    unsigned leaf, subleaf, number, bit;
} masked[MOST];
static int count;

static void let_cpuid(long answer) { syscall(SYS_arch_prctl, ARCH_SET_CPUID, answer); }

static void answer(int number, siginfo_t *info, void *context)
{
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)registers[REG_RIP];
    (void)info;
    if (code[0] != 0x0f || code[1] != 0xa2) { /* a fault of another kind */
        signal(number, SIG_DFL);
        return;
    }
    unsigned leaf = (unsigned)registers[REG_RAX], subleaf = (unsigned)registers[REG_RCX], said[4];
    let_cpuid(1);
    __cpuid_count(leaf, subleaf, said[0], said[1], said[2], said[3]);
    let_cpuid(0);
    for (int at = 0; at < count; at++)
        if (masked[at].leaf == leaf && masked[at].subleaf == subleaf)
            said[masked[at].number] &= ~(1u << masked[at].bit);
    registers[REG_RAX] = said[0];
    registers[REG_RBX] = said[1];
    registers[REG_RCX] = said[2];
    registers[REG_RDX] = said[3];
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void begin(void)
{
    const char *listed = getenv("CPU_MASK");
    int read = 0;
    while (listed && count < MOST &&
           sscanf(listed, " %x,%u,%u,%u%n", &masked[count].leaf, &masked[count].subleaf, &masked[count].number,
                  &masked[count].bit, &read) == 4) {
        listed += read;
        count++;
    }
    struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSEGV, &action, NULL);
    if (count && syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0) != 0) {
        static const char why[] = "cpu_mask: this CPU does not let CPUID fault\n";
        if (write(2, why, sizeof why - 1) < 0 || 1)
            _exit(69);
    }
}
