/*
 * The line: frames in and frames out of two fixed buffers.
 *
 * A frame is a 16-byte header, a payload of at most 64 KiB, and a 4-byte trailer. Header check and
 * trailer together tell a whole frame from half a frame that a former host left behind: such a half
 * is skipped, and what came after it is looked at again, so that a HELLO is never swallowed.
 */
#include "agent.h"

#include <unistd.h>

enum { OUT_SIZE = 256 * 1024, OUT_RESERVE = 16 * 1024 };

static const unsigned char MAGIC[4] = {0xF5, 'V', 'M', 'S'};

static unsigned char in[2 * FRAME_MAX];
static size_t in_start, in_end;
static unsigned char out[OUT_SIZE];
static size_t out_start, out_end;

uint32_t get_u32(const unsigned char *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

void put_u32(unsigned char *p, uint32_t value)
{
    p[0] = (unsigned char)value;
    p[1] = (unsigned char)(value >> 8);
    p[2] = (unsigned char)(value >> 16);
    p[3] = (unsigned char)(value >> 24);
}

struct reader reader_of(void *payload, size_t length)
{
    return (struct reader){.at = payload, .end = (unsigned char *)payload + length};
}

static unsigned char *take(struct reader *r, size_t count)
{
    static unsigned char zeros[8];
    if (r->bad || (size_t)(r->end - r->at) < count) {
        r->bad = true;
        return zeros;
    }
    r->at += count;
    return r->at - count;
}

uint8_t read_u8(struct reader *r) { return *take(r, 1); }

uint16_t read_u16(struct reader *r)
{
    unsigned char *p = take(r, 2);
    return (uint16_t)(p[0] | p[1] << 8);
}

uint32_t read_u32(struct reader *r) { return get_u32(take(r, 4)); }

uint64_t read_u64(struct reader *r)
{
    unsigned char *p = take(r, 8);
    return (uint64_t)get_u32(p) | (uint64_t)get_u32(p + 4) << 32;
}

/* A string in place: u32 length, that many bytes, a NUL that is not counted. NULL if it is not so. */
char *read_string(struct reader *r)
{
    uint32_t length = read_u32(r);
    if (r->bad || (size_t)(r->end - r->at) <= length || memchr(r->at, 0, (size_t)length + 1) != r->at + length) {
        r->bad = true;
        return NULL;
    }
    char *text = (char *)r->at;
    r->at += (size_t)length + 1;
    return text;
}

static uint16_t header_check(uint8_t type, uint8_t stream, uint32_t id, uint32_t length)
{
    uint32_t mixed = id * 0x9E3779B1u ^ length * 0x85EBCA6Bu ^ ((uint32_t)type << 8 | stream) * 0xC2B2AE35u;
    return (uint16_t)(mixed ^ mixed >> 16);
}

static uint32_t trailer_of(uint32_t id) { return 0x53D4B20Au ^ id; }

static bool parse_header(const unsigned char *p, struct frame *frame)
{
    if (memcmp(p, MAGIC, sizeof MAGIC) != 0)
        return false;
    *frame = (struct frame){.type = p[4], .stream = p[5], .id = get_u32(p + 8), .length = get_u32(p + 12)};
    return frame->length <= PAYLOAD_MAX &&
           (p[6] | p[7] << 8) == header_check(frame->type, frame->stream, frame->id, frame->length);
}

static void write_header(unsigned char *p, uint8_t type, uint8_t stream, uint32_t id, uint32_t length)
{
    uint16_t check = header_check(type, stream, id, length);
    memcpy(p, MAGIC, sizeof MAGIC);
    p[4] = type;
    p[5] = stream;
    p[6] = (unsigned char)check;
    p[7] = (unsigned char)(check >> 8);
    put_u32(p + 8, id);
    put_u32(p + 12, length);
}

/* What read(2) gave; the buffer has room for a whole frame whenever line_next() found none. */
ssize_t line_receive(int fd)
{
    if (in_start == in_end)
        in_start = in_end = 0;
    if (in_start > sizeof in / 2) {
        memmove(in, in + in_start, in_end - in_start);
        in_end -= in_start;
        in_start = 0;
    }
    ssize_t count = read(fd, in + in_end, sizeof in - in_end);
    if (count > 0)
        in_end += (size_t)count;
    return count;
}

/* Whether line_receive() has room for another page without having to move anything. */
bool line_has_gap(void) { return sizeof in - in_end >= 4096; }

static void skip_to_magic(void)
{
    in_start++;
    unsigned char *found = memchr(in + in_start, MAGIC[0], in_end - in_start);
    in_start = found ? (size_t)(found - in) : in_end;
}

bool line_next(struct frame *frame)
{
    while (in_end - in_start >= HEADER_SIZE) {
        if (!parse_header(in + in_start, frame)) {
            skip_to_magic();
            continue;
        }
        size_t whole = HEADER_SIZE + (size_t)frame->length + TRAILER_SIZE;
        if (in_end - in_start < whole)
            return false;
        frame->payload = in + in_start + HEADER_SIZE;
        if (get_u32(frame->payload + frame->length) != trailer_of(frame->id)) {
            skip_to_magic();
            continue;
        }
        in_start += whole;
        return true;
    }
    return false;
}

void line_forget_input(void) { in_start = in_end = 0; }

void line_forget_output(void) { out_start = out_end = 0; }

bool line_has_output(void) { return out_start < out_end; }

/* Whether a data frame may be queued: answers to requests always find OUT_RESERVE free. */
bool line_has_room(size_t payload)
{
    return OUT_SIZE - (out_end - out_start) >= HEADER_SIZE + payload + TRAILER_SIZE + OUT_RESERVE;
}

/* 0: all gone; 1: some is left, wait until the line takes more; -1: it failed (errno). */
int line_flush(int fd)
{
    while (out_start < out_end) {
        ssize_t count = write(fd, out + out_start, out_end - out_start);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            return errno == EAGAIN ? 1 : -1;
        out_start += (size_t)count;
    }
    out_start = out_end = 0;
    return 0;
}

unsigned char *line_reserve(size_t payload)
{
    if (OUT_SIZE - out_end < HEADER_SIZE + payload + TRAILER_SIZE) {
        memmove(out, out + out_start, out_end - out_start);
        out_end -= out_start;
        out_start = 0;
    }
    if (OUT_SIZE - out_end < HEADER_SIZE + payload + TRAILER_SIZE)
        return NULL;
    return out + out_end + HEADER_SIZE;
}

void line_commit(uint8_t type, uint8_t stream, uint32_t id, size_t length)
{
    write_header(out + out_end, type, stream, id, (uint32_t)length);
    out_end += HEADER_SIZE + length;
    put_u32(out + out_end, trailer_of(id));
    out_end += TRAILER_SIZE;
}

void line_send(uint8_t type, uint8_t stream, uint32_t id, const void *payload, size_t length)
{
    unsigned char *place = line_reserve(length);
    if (!place)
        return; /* can't be: the loop reads no request while less than OUT_RESERVE is free */
    if (length)
        memcpy(place, payload, length);
    line_commit(type, stream, id, length);
}

void line_done(uint32_t id) { line_send(FRAME_DONE, 0, id, NULL, 0); }

void line_failed(uint32_t id, int error, const char *where)
{
    unsigned char payload[8 + 1024] = {0};
    size_t length = strnlen(where, 1023);
    put_u32(payload, (uint32_t)error);
    put_u32(payload + 4, (uint32_t)length);
    memcpy(payload + 8, where, length);
    line_send(FRAME_FAILED, 0, id, payload, 8 + length + 1);
}
