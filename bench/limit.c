// limit: what the kernel allows. One process on the server's core calls send() with the same
// number of bytes on N connected sockets in turn; one on the load's core reads them. A server
// that delivers a message per send() cannot be faster than this.
//
//   limit CONNECTIONS BYTES SECONDS SENDER_CORE RECEIVER_CORE
//
// The receiver polls without sleeping, as the load client does while it measures.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void fail(const char *what) {
  perror(what);
  exit(3);
}
static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}
static double cpu_seconds(void) {
  struct rusage u;
  getrusage(RUSAGE_SELF, &u);
  return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
         (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}
static void pin(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET((size_t)core, &set);
  if (sched_setaffinity(0, sizeof set, &set)) fail("sched_setaffinity");
}

static void receive(struct sockaddr_in server, int connections) {
  static char buffer[1 << 18];
  struct epoll_event events[512];
  int ep = epoll_create1(0), open = connections;
  for (int i = 0; i < connections; i++) {
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
    if (fd < 0 || connect(fd, (struct sockaddr *)&server, sizeof server)) fail("connect");
    if (epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e)) fail("epoll_ctl");
  }
  while (open) {
    int k = epoll_wait(ep, events, 512, 0);
    for (int i = 0; i < k; i++) {
      ssize_t r = recv(events[i].data.fd, buffer, sizeof buffer, MSG_DONTWAIT);
      if (r) continue;
      close(events[i].data.fd);
      open--;
    }
  }
  _exit(0);
}

int main(int count, char **arguments) {
  if (count != 6) {
    fprintf(stderr, "limit CONNECTIONS BYTES SECONDS SENDER_CORE RECEIVER_CORE\n");
    return 2;
  }
  int connections = atoi(arguments[1]);
  size_t bytes = (size_t)atoi(arguments[2]);
  double seconds = atof(arguments[3]);
  struct rlimit files;
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  signal(SIGPIPE, SIG_IGN);

  int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
  struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t l = sizeof a;
  if (listener < 0 || bind(listener, (struct sockaddr *)&a, sizeof a) || listen(listener, 4096) ||
      getsockname(listener, (struct sockaddr *)&a, &l))
    fail("listen");
  pid_t child = fork();
  if (child < 0) fail("fork");
  if (!child) {
    pin(atoi(arguments[5]));
    receive(a, connections);
  }
  pin(atoi(arguments[4]));
  int *fd = calloc((size_t)connections, sizeof *fd);
  char *message = calloc(bytes, 1);
  if (!fd || !message) fail("calloc");
  for (int i = 0; i < connections; i++) {
    if ((fd[i] = accept(listener, NULL, NULL)) < 0) fail("accept");
    setsockopt(fd[i], IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  }
  double warm = now() + 0.3, start = 0, end = 0, cpu = 0;
  uint64_t rounds = 0;
  do {
    if (!start && now() >= warm) {
      start = now();
      end = start + seconds;
      cpu = cpu_seconds();
      rounds = 0;
    }
    for (int i = 0; i < connections; i++)
      if (send(fd[i], message, bytes, 0) != (ssize_t)bytes) fail("send");
    rounds++;
  } while (!start || now() < end);
  double elapsed = now() - start, sends = (double)rounds * connections;
  cpu = cpu_seconds() - cpu;
  for (int i = 0; i < connections; i++) close(fd[i]);
  waitpid(child, NULL, 0);
  printf("{\"sends_per_s\":%.1f,\"cpu_us_per_send\":%.3f,\"cpu_share\":%.3f}\n", sends / elapsed,
         cpu * 1e6 / sends, cpu / elapsed);
  return 0;
}
