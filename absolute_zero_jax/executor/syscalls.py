# SPDX-License-Identifier: Apache-2.0
"""System call numbers that the fence names, per machine.

Source: Linux asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64).
"""

AUDIT_ARCH = {'x86_64': 0xC000003E, 'aarch64': 0xC00000B7}

_X86_64 = '''
read=0 write=1 close=3 fstat=5 lseek=8 mmap=9 mprotect=10 munmap=11 brk=12 rt_sigaction=13
rt_sigprocmask=14 rt_sigreturn=15 mremap=25 madvise=28 getpid=39 getppid=110
gettid=186 getuid=102 geteuid=107 getgid=104 getegid=108 exit=60 exit_group=231 futex=202
clock_gettime=228 clock_getres=229 gettimeofday=96 time=201 nanosleep=35 clock_nanosleep=230
sched_yield=24 getrandom=318 sigaltstack=131 restart_syscall=219 set_robust_list=273
rseq=334 getrusage=98 times=100 sched_getaffinity=204 sysinfo=99 uname=63
fcntl=72 recvmsg=47 sendmsg=46 recvfrom=45 sendto=44 clone=56 wait4=61 kill=62 dup=32
dup2=33 dup3=292 prlimit64=302 setrlimit=160 getrlimit=97 prctl=157 seccomp=317
close_range=436 clone3=435 fork=57 vfork=58 execve=59 execveat=322 ptrace=101
process_vm_readv=310 process_vm_writev=311 mount=165 umount2=166 pivot_root=155 chroot=161
kexec_load=246 kexec_file_load=320 init_module=175 finit_module=313 delete_module=176
bpf=321 perf_event_open=298 keyctl=250 add_key=248 request_key=249 userfaultfd=323
io_uring_setup=425 io_uring_enter=426 io_uring_register=427 unshare=272 setns=308 reboot=169
swapon=167 swapoff=168 open_by_handle_at=304 landlock_create_ruleset=444
landlock_restrict_self=446 tgkill=234 tkill=200 rt_sigqueueinfo=129 openat=257 socket=41
capset=126 memfd_create=319 setitimer=38 sched_setscheduler=144'''

_AARCH64 = '''
read=63 write=64 close=57 fstat=80 lseek=62 mmap=222 mprotect=226 munmap=215 brk=214
rt_sigaction=134 rt_sigprocmask=135 rt_sigreturn=139 mremap=216 madvise=233
getpid=172 getppid=173 gettid=178 getuid=174 geteuid=175 getgid=176 getegid=177 exit=93
exit_group=94 futex=98 clock_gettime=113 clock_getres=114 gettimeofday=169 nanosleep=101
clock_nanosleep=115 sched_yield=124 getrandom=278 sigaltstack=132 restart_syscall=128
set_robust_list=99 rseq=293 getrusage=165 times=153 sched_getaffinity=123 sysinfo=179
uname=160 fcntl=25 recvmsg=212 sendmsg=211 recvfrom=207 sendto=206 clone=220
wait4=260 kill=129 dup=23 dup3=24 prlimit64=261 setrlimit=164 getrlimit=163 prctl=167
seccomp=277 close_range=436 clone3=435 execve=221 execveat=281 ptrace=117
process_vm_readv=270 process_vm_writev=271 mount=40 umount2=39 pivot_root=41 chroot=51
kexec_load=104 kexec_file_load=294 init_module=105 finit_module=273 delete_module=106
bpf=280 perf_event_open=241 keyctl=219 add_key=217 request_key=218 userfaultfd=282
io_uring_setup=425 io_uring_enter=426 io_uring_register=427 unshare=97 setns=268 reboot=142
swapon=224 swapoff=225 open_by_handle_at=265 landlock_create_ruleset=444
landlock_restrict_self=446 tgkill=131 tkill=130 rt_sigqueueinfo=138 openat=56 socket=198
capset=91 memfd_create=279 setitimer=103 sched_setscheduler=119'''


def _table(text: str) -> dict[str, int]:
  return {name: int(number) for name, number in (word.split('=') for word in text.split())}


NUMBERS = {'x86_64': _table(_X86_64), 'aarch64': _table(_AARCH64)}
