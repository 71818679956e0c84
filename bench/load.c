// load: the bench's load client. One thread, epoll, no dependencies, Linux.
//
//   load fan   N subscribers (WebSocket or SSE, perhaps none) and C publishing HTTP connections
//   load hold  N subscribers that connect, at a pace, and then only stay (memory, CPU to accept)
//   load probe one WebSocket that sends {"type":"Ping"} at a rate and times the pongs
//
// Every published body carries a mark for each recipient, "mark=NNNNNNNN-CCCC-SSSSSSSS" (hex):
// the publish's number, the publishing connection, and the sequence number of what that
// connection sent to that recipient. So what is lost, doubled or out of order is counted exactly,
// per subscriber and publishing connection, whatever the server does to the JSON around it.
//
// The client polls without sleeping while it measures: a receiver that sleeps makes the sender
// pay for waking it. The time of empty polls is subtracted, so `busy_share` says how far the
// client was from being the bottleneck, and `client_us_per_delivery` what a delivery cost it.
//
// Results are JSON, one object a line on stdout. Exit codes: 0, 2 usage, 3 the server failed us.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

// ---------------------------------------------------------------- options

static const char *mode = "fan";
static const char *transport = "ws";   // ws | sse
static int port;
static int connections;                // subscribers
static const char *paths_file;         // one request path a line, in the subscribers' order
static const char *subscribe;          // a text message that each WebSocket sends once it is open
static const char *ready_text;         // a subscriber counts as connected once it was told this
static double connect_rate;            // new subscribers a second; 0: as fast as `parallel` allows
static int parallel = 16;              // handshakes under way at once
static const char *publish_path = "/";
static const char *body_file;
static const char *headers[16];
static int header_count;
static int publishers;
static int window = 1;                 // publishes in flight, closed loop
static double rate;                    // publishes a second, open loop; 0: closed loop
static double seconds = 5, warmup = 0.5, drain = 5, stall = 5;
static bool to_one;                    // publish number n goes to subscriber n mod N, not to all
static int spread = 1;                 // without subscribers, so many recipients take turns
static int stalled;                    // the last so many subscribers never read
static int expected_status = 200;
static bool wait_for_line;             // say when connected, then wait for a line before publishing

static void die(int code, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  exit(code);
}

static void *allocate(size_t count, size_t size) {
  void *p = calloc(count ? count : 1, size);
  if (!p) die(3, "out of memory");
  return p;
}

static uint64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

// ---------------------------------------------------------------- latencies, log-linear, 1 %

enum { SUB = 128, OCTAVES = 40 };
struct histogram { uint64_t count, max, bucket[OCTAVES * SUB]; };

static unsigned bucket_of(uint64_t ns) {
  uint64_t v = ns >> 6; // 64 ns is the finest step
  if (v < SUB) return (unsigned)v;
  unsigned shift = 63u - (unsigned)__builtin_clzll(v) - 7u;
  unsigned b = (shift + 1) * SUB + (unsigned)((v >> shift) - SUB);
  return b < OCTAVES * SUB ? b : OCTAVES * SUB - 1;
}
static double bucket_ms(unsigned b) {
  if (b < SUB) return (double)((uint64_t)(b + 1) << 6) / 1e6;
  unsigned shift = b / SUB - 1;
  return (double)(((uint64_t)(b % SUB) + SUB + 1) << shift << 6) / 1e6;
}
static void record(struct histogram *h, uint64_t ns) {
  h->count++;
  if (ns > h->max) h->max = ns;
  h->bucket[bucket_of(ns)]++;
}
static double percentile(const struct histogram *h, double p) {
  uint64_t want = (uint64_t)((double)h->count * p), seen = 0;
  for (unsigned b = 0; b < OCTAVES * SUB; b++) {
    seen += h->bucket[b];
    if (seen > want) {
      double ms = bucket_ms(b), most = (double)h->max / 1e6;
      return ms < most ? ms : most;
    }
  }
  return (double)h->max / 1e6;
}

// ---------------------------------------------------------------- what was expected and what came

// Publishes, by number: when it went out and how many have it. Old entries are overwritten.
enum { RING = 1 << 18 };
struct publish { uint64_t at; uint32_t number, remaining; };
static struct publish *ring;

// A run of sequence numbers that one subscriber did not get when it should have. Rare.
struct hole { struct hole *next; uint32_t peer, publisher, from, to; };
static struct hole *holes;
static uint32_t *expected;             // [peer][publisher]: the next sequence number
static uint32_t *sent;                 // [publisher], or [peer][publisher] with --target one
static uint64_t received, duplicated, disordered, unknown, others, bytes_received;
static bool measuring;
static uint64_t measured_from;
static struct histogram latency, answer;

static uint32_t *sent_slot(uint32_t peer, uint32_t publisher) {
  return to_one ? &sent[(size_t)peer * (size_t)publishers + publisher] : &sent[publisher];
}

// True if the mark is a first arrival.
static bool account(uint32_t peer, uint32_t publisher, uint32_t sequence) {
  uint32_t *next = &expected[(size_t)peer * (size_t)publishers + publisher];
  if (sequence == *next) {
    ++*next;
    return true;
  }
  if (sequence > *next) {
    struct hole *h = allocate(1, sizeof *h);
    *h = (struct hole){holes, peer, publisher, *next, sequence};
    holes = h;
    *next = sequence + 1;
    return true;
  }
  for (struct hole **p = &holes; *p; p = &(*p)->next) {
    struct hole *h = *p;
    if (h->peer != peer || h->publisher != publisher || sequence < h->from || sequence >= h->to)
      continue;
    if (sequence + 1 < h->to) { // what is left above it
      struct hole *rest = allocate(1, sizeof *rest);
      *rest = (struct hole){h->next, peer, publisher, sequence + 1, h->to};
      h->next = rest;
    }
    h->to = sequence;
    if (h->from == h->to) {
      *p = h->next;
      free(h);
    }
    disordered++;
    return true;
  }
  duplicated++;
  return false;
}

static int reading_peers(void) { return connections - stalled; }

static uint64_t count_lost(void) {
  uint64_t lost = 0;
  for (struct hole *h = holes; h; h = h->next) lost += h->to - h->from;
  for (int i = 0; i < reading_peers(); i++)
    for (int c = 0; c < publishers; c++)
      lost += *sent_slot((uint32_t)i, (uint32_t)c) -
              expected[(size_t)i * (size_t)publishers + (size_t)c];
  return lost;
}

static int hex_value(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return -1;
}
static bool read_hex(const char *p, int digits, uint32_t *value) {
  uint32_t v = 0;
  for (int i = 0; i < digits; i++) {
    int d = hex_value(p[i]);
    if (d < 0) return false;
    v = v << 4 | (uint32_t)d;
  }
  *value = v;
  return true;
}
static void write_hex(char *p, int digits, uint32_t value) {
  for (int i = digits - 1; i >= 0; i--, value >>= 4) p[i] = "0123456789abcdef"[value & 15];
}

static const char MARK[] = "mark=";
enum { MARK_TEXT = 5, MARK_LENGTH = 5 + 8 + 1 + 4 + 1 + 8 };

// The mark stands at the same place in every message of a run, so that place is tried first.
static const char *find_mark(const char *p, size_t n) {
  static size_t usual;
  if (n < MARK_LENGTH) return NULL;
  if (usual + MARK_LENGTH <= n && !memcmp(p + usual, MARK, MARK_TEXT)) return p + usual;
  const char *m = memmem(p, n - (MARK_LENGTH - MARK_TEXT), MARK, MARK_TEXT);
  if (m) usual = (size_t)(m - p);
  return m;
}

// ---------------------------------------------------------------- subscribers

enum peer_state { CLOSED, CONNECTING, HANDSHAKE, WAITING, OPEN };
enum chunk_state { NOT_CHUNKED, SIZE_LINE, SIZE_EXTENSION, DATA, DATA_END };
struct peer {
  int fd;
  uint8_t state, chunk;
  bool muted;                          // never reads once it is connected
  size_t chunk_left;
  char *partial;                       // the beginning of a frame or event, and of nothing else
  size_t partial_length, partial_capacity;
  char *path;
};

static struct peer *peers;
static int ep, opened, opening, connected, closed_by_server, last_close_code;
static uint64_t connect_started;
static const uint32_t PUBLISHER = 1u << 30, STDIN = 1u << 31;

static void watch(int fd, uint32_t tag, uint32_t events, int operation) {
  struct epoll_event e = {.events = events, .data.u32 = tag};
  if (epoll_ctl(ep, operation, fd, &e)) die(3, "epoll_ctl: %s", strerror(errno));
}

static int dial(bool blocking, int receive_buffer) {
  int fd = socket(AF_INET, SOCK_STREAM | (blocking ? 0 : SOCK_NONBLOCK), 0), one = 1;
  if (fd < 0) die(3, "socket: %s", strerror(errno));
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  if (receive_buffer)
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
  struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(fd, (struct sockaddr *)&a, sizeof a) && errno != EINPROGRESS)
    die(3, "connect: %s", strerror(errno));
  return fd;
}

static void write_small(int fd, const void *p, size_t n) {
  // Small messages on an otherwise idle direction: the kernel takes them whole or the peer is gone.
  if (send(fd, p, n, MSG_NOSIGNAL) != (ssize_t)n && errno != EPIPE && errno != ECONNRESET)
    die(3, "short write of %zu bytes: %s", n, strerror(errno));
}

static void send_frame(int fd, unsigned opcode, const char *p, size_t n) {
  static const unsigned char key[4] = {0x5a, 0xc3, 0x17, 0x8e};
  unsigned char frame[4096];
  if (n > sizeof frame - 8) die(2, "message of %zu bytes", n);
  size_t h = 0;
  frame[h++] = (unsigned char)(0x80 | opcode);
  if (n < 126) frame[h++] = (unsigned char)(0x80 | n);
  else {
    frame[h++] = 0x80 | 126;
    frame[h++] = (unsigned char)(n >> 8);
    frame[h++] = (unsigned char)n;
  }
  memcpy(frame + h, key, 4);
  h += 4;
  for (size_t i = 0; i < n; i++) frame[h + i] = (unsigned char)p[i] ^ key[i & 3];
  write_small(fd, frame, h + n);
}

static void peer_ready(struct peer *p) {
  p->state = OPEN;
  opening--;
  connected++;
  if (p->muted) watch(p->fd, 0, 0, EPOLL_CTL_DEL);
}

static void drop_peer(struct peer *p) {
  if (p->state != OPEN) die(3, "subscriber %d was refused or closed early", (int)(p - peers));
  close(p->fd);
  p->state = CLOSED;
  closed_by_server++;
}

static void message(struct peer *p, const char *text, size_t n, size_t on_the_wire, uint64_t at) {
  const char *m = find_mark(text, n);
  uint32_t number, publisher, sequence;
  if (!m || !read_hex(m + 5, 8, &number) || !read_hex(m + 14, 4, &publisher) ||
      !read_hex(m + 19, 8, &sequence) || (int)publisher >= publishers) {
    others++;
    if (p->state == WAITING && memmem(text, n, ready_text, strlen(ready_text))) peer_ready(p);
    return;
  }
  uint32_t index = (uint32_t)(p - peers);
  if (sequence >= *sent_slot(index, publisher)) { // never published: somebody else's
    unknown++;
    return;
  }
  if (!account(index, publisher, sequence)) return;
  received++;
  bytes_received += on_the_wire;
  struct publish *e = &ring[number & (RING - 1)];
  if (e->number != number) return;
  if (e->remaining) e->remaining--;
  if (measuring && e->at >= measured_from) record(&latency, at - e->at);
}

// Takes whole frames from b and returns how many bytes they were.
static size_t take_frames(struct peer *p, const char *b, size_t n, uint64_t at) {
  size_t o = 0;
  while (n - o >= 2) {
    const unsigned char *f = (const unsigned char *)b + o;
    uint64_t length = f[1] & 127;
    size_t head = 2;
    if (f[1] & 128) die(3, "the server masked a frame");
    if (length == 126) {
      if (n - o < 4) break;
      length = (uint64_t)f[2] << 8 | f[3];
      head = 4;
    } else if (length == 127) {
      if (n - o < 10) break;
      length = 0;
      for (int k = 2; k < 10; k++) length = length << 8 | f[k];
      head = 10;
    }
    if (n - o < head + length) break;
    const char *payload = (const char *)f + head;
    switch (f[0] & 15) {
      case 1: message(p, payload, length, head + length, at); break;
      case 9: send_frame(p->fd, 10, payload, length); break;
      case 8:
        last_close_code = length >= 2 ? (unsigned char)payload[0] << 8 | (unsigned char)payload[1]
                                      : 1005;
        send_frame(p->fd, 8, payload, length);
        break;
      default: others++;
    }
    o += head + length;
  }
  return o;
}

// Takes whole events from b, lines ending in LF or CRLF, and returns how many bytes they were.
static size_t take_events(struct peer *p, const char *b, size_t n, uint64_t at) {
  size_t done = 0, line = 0;
  for (;;) {
    const char *end = memchr(b + line, '\n', n - line);
    if (!end) return done;
    size_t length = (size_t)(end - (b + line)), after = (size_t)(end - b) + 1;
    if (length && b[line + length - 1] == '\r') length--;
    if (!length) {
      if (line > done) message(p, b + done, line - done, after - done, at);
      done = after;
    }
    line = after;
  }
}

// Takes the chunked transfer coding (RFC 9112, 7.1) out of b, in place; returns what is left.
static size_t take_chunks_off(struct peer *p, char *b, size_t n) {
  size_t in = 0, out = 0;
  while (in < n) {
    char c = b[in];
    switch (p->chunk) {
      case SIZE_LINE: {
        in++;
        int d = hex_value((char)(c | 32));
        if (c == '\n') p->chunk = p->chunk_left ? DATA : SIZE_LINE;
        else if (d >= 0) p->chunk_left = p->chunk_left << 4 | (size_t)d;
        else if (c != '\r') p->chunk = SIZE_EXTENSION;
        break;
      }
      case SIZE_EXTENSION:
        in++;
        if (c == '\n') p->chunk = p->chunk_left ? DATA : SIZE_LINE;
        break;
      case DATA: {
        size_t k = n - in < p->chunk_left ? n - in : p->chunk_left;
        memmove(b + out, b + in, k);
        out += k;
        in += k;
        p->chunk_left -= k;
        if (!p->chunk_left) p->chunk = DATA_END;
        break;
      }
      default: // the CRLF behind a chunk's data
        in++;
        if (c == '\n') p->chunk = SIZE_LINE;
    }
  }
  return out;
}

static char shared[1 << 18];           // one read's bytes, with the peer's partial before them

static void keep_partial(struct peer *p, const char *b, size_t n) {
  if (n > p->partial_capacity) {
    p->partial_capacity = n;
    p->partial = realloc(p->partial, n);
    if (!p->partial) die(3, "out of memory");
  }
  memcpy(p->partial, b, n);
  p->partial_length = n;
}

static void send_request(struct peer *p) {
  char q[8192];
  int n;
  if (*transport == 'w')
    n = snprintf(q, sizeof q,
                 "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\n"
                 "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                 "Sec-WebSocket-Version: 13\r\n\r\n", p->path, port);
  else
    n = snprintf(q, sizeof q,
                 "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept: text/event-stream\r\n\r\n",
                 p->path, port);
  if (n >= (int)sizeof q) die(2, "a path of %zu bytes", strlen(p->path));
  write_small(p->fd, q, (size_t)n);
  p->state = HANDSHAKE;
}

// Reads the answer's head; returns its length, or 0 while it is not whole.
static size_t handshake(struct peer *p, char *b, size_t n) {
  char *end = memmem(b, n, "\r\n\r\n", 4);
  if (!end) return 0;
  *end = 0;
  bool websocket = *transport == 'w';
  if (n < 12 || strncmp(b + 9, websocket ? "101" : "200", 3))
    die(3, "subscriber %d: %.300s", (int)(p - peers), b);
  if (websocket && !strstr(b, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")) // RFC 6455, 1.3, for our key
    die(3, "subscriber %d: wrong Sec-WebSocket-Accept", (int)(p - peers));
  if (!websocket && strcasestr(b, "transfer-encoding: chunked")) p->chunk = SIZE_LINE;
  if (websocket && subscribe) send_frame(p->fd, 1, subscribe, strlen(subscribe));
  p->state = WAITING;
  if (!ready_text) peer_ready(p);
  return (size_t)(end - b) + 4;
}

static void read_peer(struct peer *p) {
  if (p->state == CONNECTING) {
    int error = 0;
    socklen_t l = sizeof error;
    getsockopt(p->fd, SOL_SOCKET, SO_ERROR, &error, &l);
    if (error) die(3, "connect: %s", strerror(error));
    watch(p->fd, (uint32_t)(p - peers), EPOLLIN, EPOLL_CTL_MOD);
    send_request(p);
    return;
  }
  size_t before = p->partial_length;
  memcpy(shared, p->partial, before);
  ssize_t r = recv(p->fd, shared + before, sizeof shared - before, 0);
  if (r <= 0) {
    if (r < 0 && (errno == EAGAIN || errno == EINTR)) return;
    drop_peer(p);
    return;
  }
  uint64_t at = now();
  char *b = shared;
  size_t n = before + (size_t)r, fresh = before;
  if (p->state == HANDSHAKE) {
    size_t head = handshake(p, b, n);
    if (!head) {
      if (n > 16384) die(3, "subscriber %d: a head without end", (int)(p - peers));
      keep_partial(p, b, n);
      return;
    }
    b += head;
    n -= head;
    fresh = 0;
    if (p->muted && p->state == OPEN) return;
  }
  if (p->chunk) n = fresh + take_chunks_off(p, b + fresh, n - fresh);
  size_t used = *transport == 'w' ? take_frames(p, b, n, at) : take_events(p, b, n, at);
  if (n - used > sizeof shared / 2) die(3, "a message over %zu bytes", sizeof shared / 2);
  keep_partial(p, b + used, n - used);
}

static void open_peers(void) {
  while (opened < connections && opening < parallel) {
    if (connect_rate > 0 &&
        (double)(now() - connect_started) / 1e9 * connect_rate < (double)opened) return;
    struct peer *p = &peers[opened];
    p->muted = opened >= reading_peers();
    p->fd = dial(false, p->muted ? 4096 : 0);
    p->state = CONNECTING;
    watch(p->fd, (uint32_t)opened, EPOLLOUT, EPOLL_CTL_ADD);
    opened++;
    opening++;
  }
}

// ---------------------------------------------------------------- publishers

enum place_kind { NUMBER, PUBLISHER_NUMBER, SEQUENCE, RECIPIENT };
struct place { size_t offset; enum place_kind kind; };
struct publisher {
  int fd;
  char *request;
  size_t written;                      // of the request; all of it while the answer is awaited
  bool idle;
  char answer[8192];                   // the head, and as much of the body as fits beside it
  size_t answer_length;
  uint64_t skip;                       // bytes of the answer's body that are still to come
  bool in_body;
  uint64_t at;
};
static struct publisher *senders;
static struct place *places;
static size_t place_count, request_length;
static char *request;
static uint64_t published, answered, refused;
static int next_sender;

static char *read_file(const char *name, size_t *length) {
  FILE *f = fopen(name, "r");
  if (!f) die(2, "%s: %s", name, strerror(errno));
  size_t capacity = 1 << 16, n = 0, r;
  char *b = allocate(capacity, 1);
  while ((r = fread(b + n, 1, capacity - n - 1, f)) > 0) {
    n += r;
    if (capacity - n < 4096 && !(b = realloc(b, capacity *= 2))) die(3, "out of memory");
  }
  fclose(f);
  b[n] = 0;
  *length = n;
  return b;
}

// The request as it goes out, but for the digits: {mark} in the body becomes a mark, {to} the
// recipient's number in five digits (without subscribers: 0 to --spread - 1 in turn). All have one length, so Content-Length never changes.
static void build_request(void) {
  size_t n, at = 0;
  char *text = read_file(body_file, &n), *body = allocate(n * 8 + 64, 1);
  places = allocate(n, sizeof *places);
  for (char *p = text; *p;) {
    if (!strncmp(p, "{mark}", 6)) {
      memcpy(body + at, "mark=00000000-0000-00000000", MARK_LENGTH);
      places[place_count++] = (struct place){at + 5, NUMBER};
      places[place_count++] = (struct place){at + 14, PUBLISHER_NUMBER};
      places[place_count++] = (struct place){at + 19, SEQUENCE};
      at += MARK_LENGTH;
      p += 6;
    } else if (!strncmp(p, "{to}", 4)) {
      memcpy(body + at, "00000", 5);
      places[place_count++] = (struct place){at, RECIPIENT};
      at += 5;
      p += 4;
    } else {
      body[at++] = *p++;
    }
  }
  request = allocate(at + 8192, 1);
  int h = snprintf(request, 4096,
                   "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
                   "Content-Length: %zu\r\n", publish_path, port, at);
  for (int i = 0; i < header_count; i++) {
    h += snprintf(request + h, h < 4096 ? (size_t)(4096 - h) : 0, "%s\r\n", headers[i]);
    if (h >= 4000) die(2, "headers too long");
  }
  h += snprintf(request + h, 4, "\r\n");
  memcpy(request + h, body, at);
  request_length = (size_t)h + at;
  for (size_t i = 0; i < place_count; i++) places[i].offset += (size_t)h;
  free(text);
  free(body);
}

static void write_publisher(struct publisher *s) {
  ssize_t r = send(s->fd, s->request + s->written, request_length - s->written, MSG_NOSIGNAL);
  if (r < 0 && errno != EAGAIN) die(3, "publish: %s", strerror(errno));
  if (r > 0) s->written += (size_t)r;
  watch(s->fd, PUBLISHER | (uint32_t)(s - senders),
        s->written < request_length ? EPOLLIN | EPOLLOUT : EPOLLIN, EPOLL_CTL_MOD);
}

// `at` is when the publish was due, so that an open loop's latencies contain the waiting.
static void publish(struct publisher *s, uint64_t at) {
  uint32_t number = (uint32_t)published, c = (uint32_t)(s - senders);
  uint32_t to = number % (uint32_t)(connections ? connections : spread);
  uint32_t *sequence = connections ? sent_slot(to, c) : &sent[c];
  for (size_t i = 0; i < place_count; i++) {
    char *p = s->request + places[i].offset, digits[16];
    switch (places[i].kind) {
      case NUMBER: write_hex(p, 8, number); break;
      case PUBLISHER_NUMBER: write_hex(p, 4, c); break;
      case SEQUENCE: write_hex(p, 8, *sequence); break;
      case RECIPIENT:
        snprintf(digits, sizeof digits, "%05u", to % 100000u);
        memcpy(p, digits, 5);
    }
  }
  ++*sequence;
  uint32_t remaining = to_one ? (connections ? 1 : 0) : (uint32_t)reading_peers();
  ring[number & (RING - 1)] = (struct publish){at, number, remaining};
  s->at = at;
  s->idle = false;
  s->written = 0;
  published++;
  ssize_t r = send(s->fd, s->request, request_length, MSG_NOSIGNAL);
  if (r < 0 && errno != EAGAIN) die(3, "publish: %s", strerror(errno));
  s->written = r > 0 ? (size_t)r : 0;
  if (s->written < request_length)
    watch(s->fd, PUBLISHER | c, EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
}

static void answer_complete(struct publisher *s) {
  s->idle = true;
  s->in_body = false;
  s->answer_length = 0;
  answered++;
  if (measuring && s->at >= measured_from) record(&answer, now() - s->at);
}

static void read_publisher(struct publisher *s) {
  ssize_t r = recv(s->fd, s->answer + s->answer_length, sizeof s->answer - 1 - s->answer_length, 0);
  if (r < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (r <= 0) die(3, "the server closed a publishing connection after %llu answers",
                  (unsigned long long)answered);
  if (s->idle) die(3, "an answer to no request");
  if (s->in_body) {
    if ((uint64_t)r > s->skip) die(3, "more bytes than Content-Length said");
    s->skip -= (uint64_t)r;
    if (!s->skip) answer_complete(s);
    return;
  }
  s->answer_length += (size_t)r;
  char *b = s->answer, *end;
  b[s->answer_length] = 0;
  if (!(end = strstr(b, "\r\n\r\n"))) {
    if (s->answer_length == sizeof s->answer - 1) die(3, "an answer's head without end");
    return;
  }
  if (atoi(b + 9) != expected_status && refused++ < 3) fprintf(stderr, "publish: %.600s\n", b);
  *end = 0;
  char *length = strcasestr(b, "\r\ncontent-length:");
  if (!length) die(3, "an answer without Content-Length: %.300s", b);
  uint64_t whole = strtoull(length + 17, NULL, 10);
  uint64_t have = s->answer_length - (size_t)(end + 4 - b);
  if (have > whole) die(3, "more bytes than Content-Length said");
  s->in_body = true;
  s->skip = whole - have;
  s->answer_length = 0;
  if (!s->skip) answer_complete(s);
}

// Publishes everything that may go now. False: nothing will until something arrives.
static void publish_due(uint64_t at, uint64_t *due, uint64_t interval) {
  for (;;) {
    if (rate > 0) {
      if (at < *due) return;
    } else if (connections && published >= (uint64_t)window) {
      uint32_t earlier = (uint32_t)(published - (uint64_t)window);
      const struct publish *e = &ring[earlier & (RING - 1)];
      if (e->number == earlier && e->remaining) return;
    }
    struct publisher *s = NULL;
    for (int k = 0; k < publishers && !s; k++) {
      struct publisher *candidate = &senders[(next_sender + k) % publishers];
      if (candidate->idle) s = candidate;
    }
    if (!s) return;
    next_sender = (int)(s - senders + 1) % publishers;
    publish(s, rate > 0 ? *due : now());
    *due += interval;
  }
}

// ---------------------------------------------------------------- the loop

static bool line_on_stdin;
static uint64_t idle_ns;

static void turn(int timeout_ms) {
  struct epoll_event events[512];
  uint64_t began = timeout_ms ? 0 : now();
  int k = epoll_wait(ep, events, 512, timeout_ms);
  if (k < 0 && errno != EINTR) die(3, "epoll_wait: %s", strerror(errno));
  if (k == 0 && began) idle_ns += now() - began;
  for (int i = 0; i < k; i++) {
    uint32_t tag = events[i].data.u32;
    if (tag == STDIN) {
      char line[256];
      if (read(0, line, sizeof line) <= 0) exit(0); // the runner is gone
      line_on_stdin = true;
    } else if (tag & PUBLISHER) {
      struct publisher *s = &senders[tag & ~PUBLISHER];
      if (events[i].events & EPOLLOUT) write_publisher(s);
      if (events[i].events & ~(uint32_t)EPOLLOUT) read_publisher(s);
    } else {
      read_peer(&peers[tag]);
    }
  }
}

static double cpu_seconds(void) {
  struct rusage u;
  getrusage(RUSAGE_SELF, &u);
  return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
         (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static void connect_all(void) {
  peers = allocate((size_t)connections, sizeof *peers);
  FILE *f = paths_file ? fopen(paths_file, "r") : NULL;
  if (connections && !f) die(2, "--paths: %s", paths_file ? strerror(errno) : "missing");
  for (int i = 0; i < connections; i++) {
    size_t capacity = 0;
    ssize_t n = getline(&peers[i].path, &capacity, f);
    if (n <= 0) die(2, "%s has only %d lines", paths_file, i);
    peers[i].path[strcspn(peers[i].path, "\r\n")] = 0;
  }
  if (f) fclose(f);
  connect_started = now();
  while (connected < connections) {
    open_peers();
    turn(1);
    if (now() - connect_started > 120000000000ull) die(3, "%d connected in 120 s", connected);
  }
  printf("{\"connected\":%d,\"connect_s\":%.3f,\"client_cpu_s\":%.3f}\n", connected,
         (double)(now() - connect_started) / 1e9, cpu_seconds());
  fflush(stdout);
}

static void wait_for_a_line(void) {
  watch(0, STDIN, EPOLLIN, EPOLL_CTL_ADD);
  while (!line_on_stdin) turn(1000);
  watch(0, STDIN, 0, EPOLL_CTL_DEL);
}

static int fan(void) {
  ep = epoll_create1(0);
  expected = allocate((size_t)connections * (size_t)publishers, sizeof *expected);
  sent = allocate((size_t)publishers * (size_t)(to_one ? connections : 1), sizeof *sent);
  ring = allocate(RING, sizeof *ring);
  for (int i = 0; i < RING; i++) ring[i].number = UINT32_MAX;
  build_request();
  connect_all();
  senders = allocate((size_t)publishers, sizeof *senders);
  for (int i = 0; i < publishers; i++) {
    struct publisher *s = &senders[i];
    s->request = allocate(request_length, 1);
    memcpy(s->request, request, request_length);
    s->idle = true;
    s->fd = dial(true, 0);
    watch(s->fd, PUBLISHER | (uint32_t)i, EPOLLIN, EPOLL_CTL_ADD);
  }
  if (wait_for_line) wait_for_a_line();

  uint64_t start = now(), interval = rate > 0 ? (uint64_t)(1e9 / rate) : 0, due = start;
  uint64_t from = start + (uint64_t)(warmup * 1e9), end = from + (uint64_t)(seconds * 1e9);
  uint64_t received0 = 0, answered0 = 0, bytes0 = 0, idle0 = 0, last_progress = start, t = start;
  double cpu0 = 0;
  bool gave_up = false;
  while ((t = now()) < end) {
    if (!measuring && t >= from) {
      measuring = true;
      measured_from = t;
      received0 = received, answered0 = answered, bytes0 = bytes_received;
      idle0 = idle_ns, cpu0 = cpu_seconds();
    }
    uint64_t progress = received + answered;
    publish_due(t, &due, interval);
    turn(0);
    if (received + answered > progress) last_progress = t;
    else if ((double)(t - last_progress) / 1e9 > stall && rate <= 0) {
      gave_up = true; // a closed loop that lost something waits for ever
      break;
    }
  }
  if (!measuring) die(3, "nothing moved for %.0f s: %llu published, %llu answered, %llu received",
                      stall, (unsigned long long)published, (unsigned long long)answered,
                      (unsigned long long)received);
  measuring = false;
  double elapsed = (double)(t - measured_from) / 1e9, cpu = cpu_seconds() - cpu0;
  double busy = elapsed - (double)(idle_ns - idle0) / 1e9;
  uint64_t deliveries = received - received0, answers = answered - answered0;
  uint64_t bytes = bytes_received - bytes0;
  uint64_t last = now() + (uint64_t)((gave_up ? 0.2 : drain) * 1e9);
  while (now() < last && (answered < published || count_lost())) turn(5);

  const struct histogram *h = connections ? &latency : &answer;
  printf("{\"transport\":\"%s\",\"connections\":%d,\"publishers\":%d,\"window\":%d,\"rate\":%.1f,"
         "\"elapsed_s\":%.3f,\"published\":%llu,\"answered\":%llu,\"refused\":%llu,"
         "\"received\":%llu,\"lost\":%llu,\"duplicated\":%llu,\"disordered\":%llu,"
         "\"unknown\":%llu,\"others\":%llu,\"closed\":%d,\"close_code\":%d,"
         "\"gave_up\":%s,",
         transport, connections, publishers, window, rate, elapsed,
         (unsigned long long)published, (unsigned long long)answered, (unsigned long long)refused,
         (unsigned long long)received, (unsigned long long)count_lost(),
         (unsigned long long)duplicated, (unsigned long long)disordered,
         (unsigned long long)unknown, (unsigned long long)others, closed_by_server,
         last_close_code, gave_up ? "true" : "false");
  printf("\"deliveries_per_s\":%.1f,\"answers_per_s\":%.1f,\"bytes_per_delivery\":%.2f,"
         "\"samples\":%llu,\"p50_ms\":%.3f,\"p90_ms\":%.3f,\"p99_ms\":%.3f,\"p999_ms\":%.3f,"
         "\"max_ms\":%.3f,\"client_cpu_s\":%.3f,\"busy_share\":%.4f,"
         "\"client_us_per_delivery\":%.3f,\"client_us_per_answer\":%.3f}\n",
         (double)deliveries / elapsed, (double)answers / elapsed,
         deliveries ? (double)bytes / (double)deliveries : 0, (unsigned long long)h->count,
         percentile(h, .5), percentile(h, .9), percentile(h, .99), percentile(h, .999),
         (double)h->max / 1e6, cpu, busy / elapsed,
         deliveries ? busy * 1e6 / (double)deliveries : 0,
         answers ? busy * 1e6 / (double)answers : 0);
  return 0;
}

static int hold(void) {
  ep = epoll_create1(0);
  publishers = 1;
  sent = allocate(1, sizeof *sent);
  expected = allocate((size_t)connections, sizeof *expected);
  connect_all();
  wait_for_a_line();
  printf("{\"closed\":%d,\"others\":%llu}\n", closed_by_server, (unsigned long long)others);
  return 0;
}

// ---------------------------------------------------------------- the probe

// Sends a Ping message at each tick and times its pong, from the real moment of sending, so that
// the probe's own lateness is not the server's. It asks for a real-time priority, because it
// shares its core with the load: without it, it would measure the load client's time slices.
static int probe(void) {
  struct sched_param fifo = {.sched_priority = 10};
  const char *priority = "fifo";
  if (sched_setscheduler(0, SCHED_FIFO, &fifo)) {
    priority = "nice";
    if (setpriority(PRIO_PROCESS, 0, -20)) priority = "none";
  }
  ep = epoll_create1(0);
  publishers = 1;
  connections = 1;
  sent = allocate(1, sizeof *sent);
  expected = allocate(1, sizeof *expected);
  connect_all();
  struct peer *p = &peers[0];
  enum { OUTSTANDING = 1 << 14 };
  static uint64_t at[OUTSTANDING];
  static struct histogram late;
  uint64_t interval = (uint64_t)(1e9 / (rate > 0 ? rate : 200)), start = now(), due = start;
  uint64_t end = start + (uint64_t)(seconds * 1e9), pings = 0, pongs = 0, t;
  static const char ping[] = "{\"type\":\"Ping\"}";
  size_t have = p->partial_length;
  memcpy(shared, p->partial, have);
  while ((t = now()) < end || (pongs < pings && t < end + (uint64_t)(drain * 1e9))) {
    if (t >= due && t < end && pings - pongs < OUTSTANDING) {
      record(&late, t - due);
      at[pings++ % OUTSTANDING] = t;
      send_frame(p->fd, 1, ping, sizeof ping - 1);
      due += interval;
      continue;
    }
    uint64_t until = t < end ? due : t + 10000000;
    struct timespec wait = {.tv_sec = (time_t)((until - t) / 1000000000),
                            .tv_nsec = (long)((until - t) % 1000000000)};
    struct pollfd f = {.fd = p->fd, .events = POLLIN};
    if (ppoll(&f, 1, &wait, NULL) <= 0) continue;
    ssize_t r = recv(p->fd, shared + have, sizeof shared - have, 0);
    if (r < 0 && errno == EAGAIN) continue;
    if (r <= 0) die(3, "the server closed the probe's connection");
    t = now();
    have += (size_t)r;
    size_t o = 0;
    while (have - o >= 2) { // frames; everything but a pong is passed over
      const unsigned char *f0 = (const unsigned char *)shared + o;
      size_t n = f0[1] & 127, head = n == 126 ? 4 : n == 127 ? 10 : 2;
      if (have - o < head) break;
      if (n == 126) n = (size_t)f0[2] << 8 | f0[3];
      else if (n == 127) {
        n = 0;
        for (int k = 2; k < 10; k++) n = n << 8 | f0[k];
      }
      if (have - o < head + n) break;
      if ((f0[0] & 15) == 9) send_frame(p->fd, 10, (const char *)f0 + head, n);
      else if (memmem(f0 + head, n, "\"pong\"", 6)) record(&latency, t - at[pongs++ % OUTSTANDING]);
      o += head + n;
    }
    memmove(shared, shared + o, have - o);
    have -= o;
  }
  printf("{\"priority\":\"%s\",\"pings\":%llu,\"pongs\":%llu,\"p50_ms\":%.3f,\"p90_ms\":%.3f,"
         "\"p99_ms\":%.3f,\"max_ms\":%.3f,\"own_lateness_p99_ms\":%.3f}\n",
         priority, (unsigned long long)pings, (unsigned long long)pongs, percentile(&latency, .5),
         percentile(&latency, .9), percentile(&latency, .99), (double)latency.max / 1e6,
         percentile(&late, .99));
  return 0;
}

// ---------------------------------------------------------------- main

int main(int count, char **arguments) {
  static const struct option options[] = {
      {"transport", 1, 0, 't'},     {"port", 1, 0, 'p'},      {"connections", 1, 0, 'n'},
      {"paths", 1, 0, 'F'},         {"subscribe", 1, 0, 's'}, {"ready", 1, 0, 'y'},
      {"connect-rate", 1, 0, 'r'},  {"parallel", 1, 0, 'P'},  {"publish-path", 1, 0, 'U'},
      {"body", 1, 0, 'b'},          {"header", 1, 0, 'H'},    {"publishers", 1, 0, 'C'},
      {"window", 1, 0, 'w'},        {"rate", 1, 0, 'R'},      {"seconds", 1, 0, 'd'},
      {"warmup", 1, 0, 'W'},        {"drain", 1, 0, 'D'},     {"stall", 1, 0, 'S'},
      {"target", 1, 0, 'T'},        {"stalled", 1, 0, 'x'},   {"status", 1, 0, 'c'},
      {"spread", 1, 0, 'q'},        {"wait", 0, 0, 'l'},      {0, 0, 0, 0}};
  int o;
  while ((o = getopt_long(count, arguments, "", options, NULL)) != -1) switch (o) {
    case 't': transport = optarg; break;
    case 'p': port = atoi(optarg); break;
    case 'n': connections = atoi(optarg); break;
    case 'F': paths_file = optarg; break;
    case 's': subscribe = optarg; break;
    case 'y': ready_text = optarg; break;
    case 'r': connect_rate = atof(optarg); break;
    case 'P': parallel = atoi(optarg); break;
    case 'U': publish_path = optarg; break;
    case 'b': body_file = optarg; break;
    case 'H':
      if (header_count == 16) die(2, "at most 16 headers");
      headers[header_count++] = optarg;
      break;
    case 'C': publishers = atoi(optarg); break;
    case 'w': window = atoi(optarg); break;
    case 'R': rate = atof(optarg); break;
    case 'd': seconds = atof(optarg); break;
    case 'W': warmup = atof(optarg); break;
    case 'D': drain = atof(optarg); break;
    case 'S': stall = atof(optarg); break;
    case 'T': to_one = !strcmp(optarg, "one"); break;
    case 'x': stalled = atoi(optarg); break;
    case 'c': expected_status = atoi(optarg); break;
    case 'q': spread = atoi(optarg); break;
    case 'l': wait_for_line = true; break;
    default: return 2;
  }
  if (optind < count) mode = arguments[optind];
  to_one = to_one && connections;
  if (port < 1 || connections < 0 || stalled > connections || window < 1 || spread < 1 || parallel < 1 ||
      (strcmp(transport, "ws") && strcmp(transport, "sse")))
    die(2, "bad options");
  struct rlimit files;
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  if ((rlim_t)(connections + publishers + 16) > files.rlim_cur)
    die(2, "%d sockets, but the limit of open files is %llu", connections + publishers,
        (unsigned long long)files.rlim_cur);
  if (!strcmp(mode, "fan")) {
    if (publishers < 1 || publishers > 65535 || !body_file) die(2, "fan: --publishers and --body");
    return fan();
  }
  if (!strcmp(mode, "hold")) return hold();
  if (!strcmp(mode, "probe")) return probe();
  die(2, "unknown mode %s", mode);
}
