/* Measures a TFLite model on a Linux board that has no Python: one session per call.
 *
 *     runner read WORK_DIR GLOB...  the board: machine, C library, free space, what these files say
 *     runner session KEY=VALUE...   one session (the keys are in parse_job)
 *     runner end WORK_DIR JOB       give the lease back
 *     runner hold WORK_DIR JOB OWNER LEASE_S PROGRAM [ARGUMENT...]   as of agent.py
 *     runner release WORK_DIR JOB   as of agent.py
 *
 * Each prints ONE JSON object on stdout; the exit code is its "code", as agent.py has them. It links
 * libc alone (dlopen brings the runtime), is compiled on the host by edgepipe/crunner.py and pushed.
 * The parent checks, holds the lease and watches the clock; the session runs in a forked child, so a
 * model that crashes is a line of data and the runner lives on. The data of a session has the shape
 * that worker.py gives it.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <linux/perf_event.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#ifdef __GLIBC__
#include <gnu/libc-version.h>
#include <malloc.h>
#endif

enum {
    SCHEMA = 2,
    OK = 0, BUG = 1, BAD_JOB = 64, DATA_MISMATCH = 65, NO_RUNTIME = 69, WORKER_FAILED = 70,
    UNUSABLE = 71, DISK_FULL = 73, BUSY = 75, OVER_BUDGET = 124
};
enum { MAX_ARMS = 2, MAX_TENSORS = 64, MAX_CPUS = 256, STDERR_TAIL = 4000 };

/* As in worker.py: below this a sample is a batch of inferences. */
static const int64_t BATCH_BELOW_NS = 200000, BATCH_TARGET_NS = 250000;
/* A session whose thread had the CPU for less than this share of the wall time was contended. */
static const double CONTENDED_BELOW = 0.97;

#if defined(__x86_64__)
static const char MACHINE[] = "x86_64";
static const int ELF_MACHINE = 62; /* e_machine, elf.h */
#elif defined(__aarch64__)
static const char MACHINE[] = "aarch64";
static const int ELF_MACHINE = 183;
#elif defined(__arm__)
static const char MACHINE[] = "armv7l";
static const int ELF_MACHINE = 40;
#else
#error "no LiteRT library is known for this machine"
#endif

/* ------------------------------------------------------------------------------- the job */

typedef struct {
    const char *name, *path, *sha256, *signature; /* "": the main graph */
    char cache[4200]; /* XNNPACK's packed weights, or empty */
    long long size;
} Arm;

typedef struct {
    const char *id, *owner, *work_dir, *job_dir, *tag, *kind, *identity, *kernel;
    const char *runtime, *runtime_sha256, *self_test;
    const char *inputs, *inputs_sha256;
    const char *input_names[MAX_TENSORS];
    const char *globs[64];
    Arm arms[MAX_ARMS];
    int arm_count, input_name_count, glob_count, cpus[MAX_CPUS], cpu_count, threads;
    long long runtime_size, inputs_size, input_count, first_input, min_inferences, min_free_bytes;
    double warmup_s, session_s, limit_s, lease_s;
    uint64_t seed, order_seed;
    bool weight_cache;
} Job;

static Job job;

/* ------------------------------------------------------------------------------ small tools */

static int64_t clock_ns(clockid_t clock)
{
    struct timespec at;
    clock_gettime(clock, &at);
    return at.tv_sec * 1000000000LL + at.tv_nsec;
}

static int64_t wall_ns(void) { return clock_ns(CLOCK_MONOTONIC); }

static void put_text(FILE *out, const char *text)
{
    putc('"', out);
    for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
        if (*c == '"' || *c == '\\')
            fprintf(out, "\\%c", *c);
        else if (*c == '\n')
            fputs("\\n", out);
        else if (*c < 0x20)
            fprintf(out, "\\u%04x", *c);
        else
            putc(*c, out);
    }
    putc('"', out);
}

static void put_numbers(FILE *out, const int64_t *values, size_t count)
{
    putc('[', out);
    for (size_t i = 0; i < count; i++)
        fprintf(out, "%s%lld", i ? "," : "", (long long)values[i]);
    putc(']', out);
}

/* A whole small file as text (NUL bytes become blanks) in a static buffer, or NULL. */
static char *read_text(const char *path)
{
    static char text[1 << 18];
    ssize_t got, length = 0;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return NULL;
    while ((got = read(file, text + length, sizeof text - 1 - length)) > 0)
        length += got;
    close(file);
    if (got < 0)
        return NULL;
    for (ssize_t i = 0; i < length; i++)
        if (!text[i])
            text[i] = ' ';
    text[length] = 0;
    return text;
}

/* The number after `key` in a text such as /proc/self/status, or -1. */
static long long number_after(const char *text, const char *key)
{
    const char *at = text ? strstr(text, key) : NULL;
    return at ? atoll(at + strlen(key)) : -1;
}

/* ------------------------------------------------------------------- SHA-256 (FIPS 180-4) */

typedef struct {
    uint32_t state[8];
    uint64_t bytes;
    unsigned char block[64];
} Sha256;

static void sha256_block(Sha256 *sha)
{
    static const uint32_t K[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
        0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe,
        0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f,
        0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7,
        0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc,
        0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
        0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116,
        0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
        0xc67178f2};
#define ROTATE(x, n) ((x) >> (n) | (x) << (32 - (n)))
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)sha->block[4 * i] << 24 | sha->block[4 * i + 1] << 16 |
               sha->block[4 * i + 2] << 8 | sha->block[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (ROTATE(a, 7) ^ ROTATE(a, 18) ^ a >> 3) + w[i - 7] +
               (ROTATE(b, 17) ^ ROTATE(b, 19) ^ b >> 10);
    }
    memcpy(s, sha->state, sizeof s);
    for (int i = 0; i < 64; i++) {
        uint32_t t = s[7] + (ROTATE(s[4], 6) ^ ROTATE(s[4], 11) ^ ROTATE(s[4], 25)) +
                     ((s[4] & s[5]) ^ (~s[4] & s[6])) + K[i] + w[i];
        uint32_t u = (ROTATE(s[0], 2) ^ ROTATE(s[0], 13) ^ ROTATE(s[0], 22)) +
                     ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
        memmove(s + 1, s, 7 * sizeof *s);
        s[4] += t;
        s[0] = t + u;
    }
    for (int i = 0; i < 8; i++)
        sha->state[i] += s[i];
}

static void sha256_start(Sha256 *sha)
{
    static const uint32_t START[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memcpy(sha->state, START, sizeof START);
    sha->bytes = 0;
}

static void sha256_add(Sha256 *sha, const void *data, size_t size)
{
    const unsigned char *at = data;
    while (size) {
        size_t used = sha->bytes % 64, take = 64 - used < size ? 64 - used : size;
        memcpy(sha->block + used, at, take);
        sha->bytes += take;
        at += take;
        size -= take;
        if (sha->bytes % 64 == 0)
            sha256_block(sha);
    }
}

static void sha256_end(Sha256 *sha, char hex[65])
{
    uint64_t bits = sha->bytes * 8;
    unsigned char length[8];
    sha256_add(sha, "\x80", 1);
    while (sha->bytes % 64 != 56)
        sha256_add(sha, "", 1);
    for (int i = 0; i < 8; i++)
        length[i] = bits >> (56 - 8 * i) & 255;
    sha256_add(sha, length, 8);
    for (int i = 0; i < 8; i++)
        snprintf(hex + 8 * i, 9, "%08x", sha->state[i]);
}

/* ---------------------------------------------------------------------------- the answer */

/* Ends the call with an exit code and no session. `owner`: the text of the lease, or NULL. */
static void stop(int code, const char *error, const char *owner, const char *format, ...)
{
    char message[2048];
    va_list more;
    va_start(more, format);
    vsnprintf(message, sizeof message, format, more);
    va_end(more);
    printf("{\"schema\":%d,\"code\":%d,\"error\":", SCHEMA, code);
    put_text(stdout, error);
    fputs(",\"message\":", stdout);
    put_text(stdout, message);
    if (owner) {
        fputs(",\"owner_text\":", stdout);
        put_text(stdout, owner);
    }
    puts("}");
    exit(fflush(stdout) ? BUG : code);
}

/* {"realtime_s", "monotonic_s", "files": {path: text}}: the host knows what the files mean.
 * EDGEPIPE_SYSROOT: tests point it at a made-up /sys and /proc, as in board.py. */
static void put_files(FILE *out, const char **globs, int count)
{
    const char *root = getenv("EDGEPIPE_SYSROOT");
    size_t skip = root ? strlen(root) : 0;
    bool first = true;
    fprintf(out, "{\"realtime_s\":%.6f,\"monotonic_s\":%.6f,\"files\":{",
            clock_ns(CLOCK_REALTIME) / 1e9, wall_ns() / 1e9);
    for (int i = 0; i < count; i++) {
        char pattern[4096];
        glob_t found;
        snprintf(pattern, sizeof pattern, "%s%s", root ? root : "", globs[i]);
        if (glob(pattern, 0, NULL, &found))
            continue;
        for (size_t k = 0; k < found.gl_pathc; k++) {
            const char *text = read_text(found.gl_pathv[k]);
            if (!text)
                continue;
            if (!first)
                putc(',', out);
            first = false;
            put_text(out, found.gl_pathv[k] + skip);
            putc(':', out);
            put_text(out, text);
        }
        globfree(&found);
    }
    fputs("}}", out);
}

/* --------------------------------------------------------------------------------- lease */

/* The same file, lock and text as agent.py: flock while running, and until a moment after the owner
 * named in it. Returns the open file; stop(75) where another job has the board. */
static int take_lease(void)
{
    static char path[4096], owner[4096];
    char *boot, mine[4096];
    snprintf(path, sizeof path, "%s/lock", job.work_dir);
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (file < 0)
        stop(errno == ENOSPC ? DISK_FULL : UNUSABLE, "os-error", NULL, "%s: %s", path, strerror(errno));
    bool taken = flock(file, LOCK_EX | LOCK_NB) == 0;
    ssize_t length = pread(file, owner, sizeof owner - 1, 0);
    owner[length > 0 ? length : 0] = 0;
    if (!taken)
        stop(BUSY, "busy", owner, "another job is running on this board");
    double now = clock_ns(CLOCK_BOOTTIME) / 1e9, until = 0;
    const char *at = strstr(owner, "\"until_boottime_s\": ");
    if (at)
        until = atof(at + 20);
    snprintf(mine, sizeof mine, "\"job\": \"%s\"", job.id);
    boot = read_text("/proc/sys/kernel/random/boot_id");
    if (boot)
        boot[strcspn(boot, "\n")] = 0;
    if (!strstr(owner, mine) && boot && *boot && strstr(owner, boot) && until > now)
        stop(BUSY, "busy", owner, "another job holds this board for %.0f s more", until - now);
    return file;
}

static void write_lease(int file, double until_boottime_s)
{
    char text[4096];
    char *boot = read_text("/proc/sys/kernel/random/boot_id");
    if (boot)
        boot[strcspn(boot, "\n")] = 0;
    int length = snprintf(text, sizeof text,
                          "{\"job\": \"%s\", \"owner\": \"%s\", \"pid\": %d, \"since_unix_s\": %lld, "
                          "\"until_boottime_s\": %.3f, \"boot_id\": \"%s\"}",
                          job.id, job.owner, (int)getpid(), (long long)time(NULL), until_boottime_s,
                          boot ? boot : "");
    /* in this order: whoever looks meanwhile finds an owner */
    if (pwrite(file, text, length, 0) != length || ftruncate(file, length))
        fprintf(stderr, "runner: the lease was not written: %s\n", strerror(errno));
}

static void end_lease(const char *work_dir, const char *id)
{
    char path[4096], owner[4096], mine[4096];
    snprintf(path, sizeof path, "%s/lock", work_dir);
    snprintf(mine, sizeof mine, "\"job\": \"%s\"", id);
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file >= 0 && flock(file, LOCK_EX | LOCK_NB) == 0) {
        ssize_t length = pread(file, owner, sizeof owner - 1, 0);
        owner[length > 0 ? length : 0] = 0;
        if (strstr(owner, mine) && ftruncate(file, 0))
            stop(UNUSABLE, "os-error", NULL, "%s: %s", path, strerror(errno));
    }
}

/* Become a program that has the lease. */
static void hold(char **argv)
{
    job.work_dir = argv[0], job.id = argv[1], job.owner = argv[2];
    int lease = take_lease();
    write_lease(lease, clock_ns(CLOCK_BOOTTIME) / 1e9 + atof(argv[3]));
    fcntl(lease, F_SETFD, 0);
    execvp(argv[4], argv + 4);
    stop(UNUSABLE, "os-error", NULL, "%s: %s", argv[4], strerror(errno));
}

/* Kill the program that `hold` became for this job, where it still runs. */
static void stop_holder(const char *work_dir, const char *id)
{
    char path[4096], owner[4096], mine[4096];
    snprintf(path, sizeof path, "%s/lock", work_dir);
    snprintf(mine, sizeof mine, "\"job\": \"%s\"", id);
    int file = open(path, O_RDWR | O_CLOEXEC);
    for (int looks = 0; looks < 250 && file >= 0 && flock(file, LOCK_EX | LOCK_NB); looks++) {
        ssize_t length = pread(file, owner, sizeof owner - 1, 0);
        owner[length > 0 ? length : 0] = 0;
        const char *pid = strstr(owner, "\"pid\": ");
        if (pid && !strstr(owner, mine))
            break;
        if (pid && atoi(pid + 7) > 0) /* whoever holds the lock wrote its number into it */
            kill(atoi(pid + 7), SIGKILL);
        usleep(20000);
    }
    if (file >= 0)
        close(file);
}

/* ----------------------------------------------------------------- the child: one session */

static int result_pipe = -1; /* in the child: '+' and the data, or '-', what, NUL, message */

/* The session ends here with a cause; what the runtime had to say is on stderr. */
static void fail(const char *what, const char *format, ...)
{
    char text[2048];
    va_list more;
    int length = snprintf(text, 64, "-%s", what) + 1;
    va_start(more, format);
    vsnprintf(text + length, sizeof text - length, format, more);
    va_end(more);
    length += strlen(text + length);
    if (write(result_pipe, text, length) != length)
        _exit(2);
    _exit(1);
}

static void *allocate(size_t count, size_t size)
{
    void *at = calloc(count ? count : 1, size);
    if (!at)
        fail("out-of-memory", "out of memory");
    return at;
}

/* The CompiledModel C API as of LiteRT 2.1.6 (litert/c/). Older libraries have the same symbols with
 * other signatures: the host pushes only libraries that it knows by sha256. */
typedef void *Handle;
typedef struct { uint32_t bits; int32_t dims[8]; uint32_t strides[8]; } Layout;
typedef struct { int element; Layout layout; } TensorType;
typedef struct { int type; int64_t value; } LiteRtAny;
typedef struct { int tag; LiteRtAny value; } EnvironmentOption;
typedef struct { size_t total, in_use, private_bytes; } MemoryUsage;
typedef struct {
    const char *tag;
    int type;
    uint64_t start_us, elapsed_us;
    MemoryUsage begin, end;
    uint64_t metadata1, metadata2;
    int source;
} ProfilerEvent;

#define API(X)                                                                                     \
    X(CreateEnvironment, (int, const EnvironmentOption *, Handle *))                               \
    X(CreateModelFromFile, (Handle, const char *, Handle *))                                       \
    X(CreateOptions, (Handle *))                                                                   \
    X(SetOptionsHardwareAccelerators, (Handle, int))                                               \
    X(CreateOpaqueOptions, (const char *, void *, void (*)(void *), Handle *))                     \
    X(AddOpaqueOptions, (Handle, Handle))                                                          \
    X(CreateCompiledModel, (Handle, Handle, Handle, Handle *))                                     \
    X(DestroyCompiledModel, (Handle))                                                              \
    X(GetNumModelSignatures, (Handle, size_t *))                                                   \
    X(GetModelSignature, (Handle, size_t, Handle *))                                               \
    X(GetSignatureKey, (Handle, const char **))                                                    \
    X(GetSignatureSubgraph, (Handle, Handle *))                                                    \
    X(GetNumSignatureInputs, (Handle, size_t *))                                                   \
    X(GetNumSignatureOutputs, (Handle, size_t *))                                                  \
    X(GetSignatureInputTensorByIndex, (Handle, size_t, Handle *))                                  \
    X(GetSignatureOutputTensorByIndex, (Handle, size_t, Handle *))                                 \
    X(GetTensorName, (Handle, const char **))                                                      \
    X(GetRankedTensorType, (Handle, TensorType *))                                                 \
    X(GetCompiledModelInputTensorLayout, (Handle, size_t, size_t, Layout *))                       \
    X(GetCompiledModelOutputTensorLayouts, (Handle, size_t, size_t, Layout *, bool))               \
    X(GetCompiledModelInputBufferRequirements, (Handle, size_t, size_t, Handle *))                 \
    X(GetCompiledModelOutputBufferRequirements, (Handle, size_t, size_t, Handle *))                \
    X(CreateManagedTensorBufferFromRequirements, (Handle, const TensorType *, Handle, Handle *))   \
    X(GetTensorBufferPackedSize, (Handle, size_t *))                                               \
    X(LockTensorBuffer, (Handle, void **, int))                                                    \
    X(UnlockTensorBuffer, (Handle))                                                                \
    X(RunCompiledModel, (Handle, size_t, size_t, Handle *, size_t, Handle *))                      \
    X(GetModelSubgraph, (Handle, size_t, Handle *))                                                \
    X(GetNumSubgraphOps, (Handle, size_t *))                                                       \
    X(GetSubgraphOp, (Handle, size_t, Handle *))                                                   \
    X(GetOpCode, (Handle, int *))                                                                  \
    X(CompiledModelGetProfiler, (Handle, Handle *))                                                \
    X(StartProfiler, (Handle))                                                                     \
    X(StopProfiler, (Handle))                                                                      \
    X(ResetProfiler, (Handle))                                                                     \
    X(GetNumProfilerEvents, (Handle, int *))                                                       \
    X(GetProfilerEvents, (Handle, int, ProfilerEvent *))

#define DECLARE(name, arguments) int(*name) arguments;
static struct { API(DECLARE) } lite;

static void check(int status, const char *function)
{
    if (status == 2) /* kLiteRtStatusErrorMemoryAllocationFailure (litert/c/litert_common.h) */
        fail("out-of-memory", "out of memory");
    if (status) /* 5: kLiteRtStatusErrorUnsupported, variable tensors for one */
        fail(status == 5 ? "unsupported" : "error", "LiteRt%s: status %d", function, status);
}
#define DO(function, ...) check(lite.function(__VA_ARGS__), #function)

/* TfLiteType number (tensorflow/compiler/mlir/lite/core/c/tflite_types.h) -> name, bytes */
static const struct { int type; const char *name; int bytes; } ELEMENTS[] = {
    {1, "float32", 4}, {2, "int32", 4},  {3, "uint8", 1},    {4, "int64", 8},
    {6, "bool", 1},    {7, "int16", 2},  {9, "int8", 1},     {10, "float16", 2},
    {11, "float64", 8}, {13, "uint64", 8}, {16, "uint32", 4}, {17, "uint16", 2}};

typedef struct {
    const char *name;
    char dtype[16];
    int element, rank, dims[8];
    size_t bytes;
    Handle handle;
} Tensor;

typedef struct {
    Handle model, compiled, in[MAX_TENSORS], out[MAX_TENSORS];
    Tensor inputs[MAX_TENSORS], outputs[MAX_TENSORS];
    size_t input_count, output_count;
    size_t number; /* of the signature that is run */
    int64_t parts_ns[4]; /* environment, model, compile, buffers */
    bool calls_graphs, stateful;
    char output_sha256[65];
} Model;

static int64_t runtime_load_ns = -1;

static void load_runtime(void)
{
    if (runtime_load_ns >= 0)
        return;
    int64_t began = wall_ns();
    void *library = dlopen(job.runtime, RTLD_LAZY | RTLD_LOCAL);
    if (!library)
        fail("error", "%s", dlerror());
    runtime_load_ns = wall_ns() - began;
#define RESOLVE(name, arguments)                                                                   \
    lite.name = (int(*) arguments)dlsym(library, "LiteRt" #name);                                  \
    if (!lite.name)                                                                                \
        fail("error", "%s has no symbol LiteRt" #name, job.runtime);
    API(RESOLVE)
}

static void add_options(Handle options, const char *name, const char *toml)
{
    Handle made;
    DO(CreateOpaqueOptions, name, strdup(toml), free, &made); /* the library frees it */
    DO(AddOpaqueOptions, options, made);
}

static void describe(Tensor *tensor, Handle of, const TensorType *type, Handle buffer)
{
    const char *name = NULL;
    DO(GetTensorName, of, &name);
    tensor->name = strdup(name ? name : "");
    tensor->element = type->element;
    snprintf(tensor->dtype, sizeof tensor->dtype, "type %d", type->element);
    for (size_t i = 0; i < sizeof ELEMENTS / sizeof *ELEMENTS; i++)
        if (ELEMENTS[i].type == type->element)
            snprintf(tensor->dtype, sizeof tensor->dtype, "%s", ELEMENTS[i].name);
    tensor->rank = type->layout.bits & 0x7F;
    memcpy(tensor->dims, type->layout.dims, sizeof tensor->dims);
    DO(GetTensorBufferPackedSize, buffer, &tensor->bytes);
    tensor->handle = buffer;
}

/* The number of the signature `key` ("": that of the main graph, which a file without any has as
 * well), its handle and its graph. */
static size_t find_signature(Handle model, const char *key, Handle *signature, Handle *graph)
{
    Handle main_graph;
    char keys[1500] = "";
    size_t count, used = 0;
    DO(GetModelSubgraph, model, 0, &main_graph);
    DO(GetNumModelSignatures, model, &count);
    for (size_t i = 0; i < count; i++) {
        const char *name = NULL;
        DO(GetModelSignature, model, i, signature);
        DO(GetSignatureSubgraph, *signature, graph);
        DO(GetSignatureKey, *signature, &name);
        name = name ? name : "";
        if (*key ? !strcmp(name, key) : *graph == main_graph)
            return i;
        if (used < sizeof keys)
            used += snprintf(keys + used, sizeof keys - used, "%s%s", i ? ", " : "", name);
    }
    if (!*key)
        fail("unsupported", "no signature is of the main graph; they are: %s", keys);
    fail("bad-request", "the model has no signature '%.300s'; it has: %s", key, keys);
    return 0;
}

/* Whether a graph has one of these operators (builtin ones of the tflite schema.fbs). */
static bool has_operator(Handle graph, const int *codes, size_t code_count)
{
    Handle operator;
    size_t count;
    int code;
    DO(GetNumSubgraphOps, graph, &count);
    for (size_t i = 0; i < count; i++) {
        DO(GetSubgraphOp, graph, i, &operator);
        DO(GetOpCode, operator, &code);
        for (size_t k = 0; k < code_count; k++)
            if (code == codes[k])
                return true;
    }
    return false;
}

/* As in backends.py. */
static const int STATEFUL[] = {16, 24, 27, 35, 44, 46, 52, 129, 142, 143, 144};
static const int CALLING[] = {31, 118, 119, 129, 173, 174, 190, 198, 199, 200, 206, 209};

static void open_model(Model *m, const char *path, const char *key, const char *weight_cache, bool profile)
{
    static Handle environment;
    int64_t at[5];
    char cpu[4400];
    Handle options, signature, graph;
    load_runtime();
    at[0] = wall_ns();
    if (!environment) {
        /* tag 24: accelerators to register = CPU only (1); tag 25: log severity = errors (3); both
         * are integers (LiteRtAny type 2). litert/c/litert_environment_options.h */
        EnvironmentOption wanted[2] = {{24, {2, 1}}, {25, {2, 3}}};
        DO(CreateEnvironment, 2, wanted, &environment);
    }
    at[1] = wall_ns();
    DO(CreateModelFromFile, environment, path, &m->model);
    m->number = find_signature(m->model, key, &signature, &graph);
    at[2] = wall_ns();
    DO(CreateOptions, &options);
    DO(SetOptionsHardwareAccelerators, options, 1); /* CPU */
    int used = snprintf(cpu, sizeof cpu, "num_threads = %d\n", job.threads);
    if (*job.kernel)
        used += snprintf(cpu + used, sizeof cpu - used, "kernel_mode = \"%s\"\n", job.kernel);
    if (*weight_cache)
        snprintf(cpu + used, sizeof cpu - used, "weight_cache_file_path = \"%s\"\n", weight_cache);
    add_options(options, "xnnpack", cpu);
    if (profile)
        add_options(options, "runtime_options_string", "enable_profiling = true\n");
    DO(CreateCompiledModel, environment, m->model, options, &m->compiled);
    at[3] = wall_ns();
    DO(GetNumSignatureInputs, signature, &m->input_count);
    DO(GetNumSignatureOutputs, signature, &m->output_count);
    if (m->input_count > MAX_TENSORS || m->output_count > MAX_TENSORS)
        fail("unsupported", "the model has more than %d inputs or outputs", MAX_TENSORS);
    /* the model's own layouts have -1 for a dynamic batch; the compiled model's do not */
    static Layout layouts[MAX_TENSORS];
    DO(GetCompiledModelOutputTensorLayouts, m->compiled, m->number, m->output_count, layouts, true);
    for (size_t k = 0; k < m->input_count; k++) {
        Handle tensor, needs;
        TensorType type;
        DO(GetSignatureInputTensorByIndex, signature, k, &tensor);
        DO(GetRankedTensorType, tensor, &type);
        DO(GetCompiledModelInputTensorLayout, m->compiled, m->number, k, &type.layout);
        DO(GetCompiledModelInputBufferRequirements, m->compiled, m->number, k, &needs);
        DO(CreateManagedTensorBufferFromRequirements, environment, &type, needs, &m->in[k]);
        describe(&m->inputs[k], tensor, &type, m->in[k]);
    }
    for (size_t k = 0; k < m->output_count; k++) {
        Handle tensor, needs;
        TensorType type;
        DO(GetSignatureOutputTensorByIndex, signature, k, &tensor);
        DO(GetRankedTensorType, tensor, &type);
        type.layout = layouts[k];
        DO(GetCompiledModelOutputBufferRequirements, m->compiled, m->number, k, &needs);
        DO(CreateManagedTensorBufferFromRequirements, environment, &type, needs, &m->out[k]);
        describe(&m->outputs[k], tensor, &type, m->out[k]);
    }
    at[4] = wall_ns();
    for (int i = 0; i < 4; i++)
        m->parts_ns[i] = at[i + 1] - at[i];
    m->calls_graphs = has_operator(graph, CALLING, sizeof CALLING / sizeof *CALLING);
    m->stateful = m->calls_graphs || /* do not guess what the other graphs do */
                  has_operator(graph, STATEFUL, sizeof STATEFUL / sizeof *STATEFUL);
}

static inline void call(Model *m)
{
    int status = lite.RunCompiledModel(m->compiled, m->number, m->input_count, m->in, m->output_count, m->out);
    if (status)
        check(status, "RunCompiledModel");
}

static uint64_t next_random(uint64_t *state) /* splitmix64, Steele et al. 2014 */
{
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

/* Seeded random inputs: floats in [-1, 1), small integer types over their whole range, wide ones 0
 * or 1 (they are indices as a rule). */
static void fill_random(Model *m, uint64_t seed)
{
    for (size_t k = 0; k < m->input_count; k++) {
        Tensor *tensor = &m->inputs[k];
        void *at;
        int width = 0;
        for (size_t i = 0; i < sizeof ELEMENTS / sizeof *ELEMENTS; i++)
            if (ELEMENTS[i].type == tensor->element)
                width = ELEMENTS[i].bytes;
        if (!width)
            fail("bad-request", "there is no random input of type %s: give samples", tensor->dtype);
        DO(LockTensorBuffer, tensor->handle, &at, 1); /* kLiteRtTensorBufferLockModeWrite */
        for (size_t i = 0; i < tensor->bytes / width; i++) {
            uint64_t bits = next_random(&seed);
            double uniform = (bits >> 11) / 4503599627370496.0 - 1; /* 2^53 values in [-1, 1) */
            switch (tensor->element) {
            case 1: ((float *)at)[i] = (float)uniform; break;
            case 11: ((double *)at)[i] = uniform; break;
            case 10: ((uint16_t *)at)[i] = (bits & 0x83ff) | 0x3800; break; /* +-[0.5, 1) */
            case 3: case 9: ((uint8_t *)at)[i] = bits >> 32; break;
            case 7: case 17: ((uint16_t *)at)[i] = bits >> 32; break;
            case 6: ((uint8_t *)at)[i] = bits >> 63; break;
            default:
                memset((char *)at + i * width, 0, width);
                ((char *)at)[i * width] = bits >> 63; /* every board here is little-endian */
            }
        }
        DO(UnlockTensorBuffer, tensor->handle);
    }
}

static void warm_up_runtime(void)
{
    static Model tiny;
    open_model(&tiny, job.self_test, "", "", false);
    fill_random(&tiny, 0);
    call(&tiny);
}

static void put_tensors(FILE *out, const Tensor *tensors, size_t count)
{
    putc('[', out);
    for (size_t k = 0; k < count; k++) {
        fputs(k ? ",{\"name\":" : "{\"name\":", out);
        put_text(out, tensors[k].name);
        fprintf(out, ",\"dtype\":\"%s\",\"bytes\":%zu,\"shape\":[", tensors[k].dtype, tensors[k].bytes);
        for (int i = 0; i < tensors[k].rank && i < 8; i++)
            fprintf(out, "%s%d", i ? "," : "", tensors[k].dims[i]);
        fputs("]}", out);
    }
    putc(']', out);
}

static void session_self_test(FILE *out)
{
    static const float IN[4] = {0, 1, 2, 3}, OUT[4] = {1, 3, 5, 7}; /* y = 2 x + 1 */
    static Model model;
    void *at;
    open_model(&model, job.self_test, "", "", false);
    DO(LockTensorBuffer, model.in[0], &at, 1);
    memcpy(at, IN, sizeof IN);
    DO(UnlockTensorBuffer, model.in[0]);
    call(&model);
    DO(LockTensorBuffer, model.out[0], &at, 0); /* kLiteRtTensorBufferLockModeRead */
    if (memcmp(at, OUT, sizeof OUT))
        fail("error", "the runtime computes y = 2 x + 1 wrongly");
    fprintf(out, "{\"runtime_load_ns\":%lld}", (long long)runtime_load_ns);
}

/* Ask the kernel to forget a file -> the share of its pages still in memory, or -1. Without
 * privilege; mincore(2) tells whether it was done (tmpfs has nowhere else to keep the file). */
static double drop_from_page_cache(const char *path)
{
    struct stat status;
    double share = -1;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0 || fstat(file, &status))
        fail("error", "%s: %s", path, strerror(errno));
    fsync(file);
    posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
    size_t page = sysconf(_SC_PAGESIZE), pages = (status.st_size + page - 1) / page, in_memory = 0;
    void *at = mmap(NULL, status.st_size, PROT_READ, MAP_SHARED, file, 0);
    if (at != MAP_FAILED) {
        unsigned char *resident = allocate(pages, 1);
        if (mincore(at, status.st_size, resident) == 0) {
            for (size_t i = 0; i < pages; i++)
                in_memory += resident[i] & 1;
            share = in_memory / (double)pages;
        }
        free(resident);
        munmap(at, status.st_size);
    }
    close(file);
    return share;
}

static int64_t load_ns(const Model *m)
{
    return m->parts_ns[0] + m->parts_ns[1] + m->parts_ns[2] + m->parts_ns[3];
}

static int only_arm; /* the one that a child of a cold or weight-cache session loads */

/* The first start with a cache packs the weights and writes them, every later one maps them. It is
 * the later ones that are measured. */
static void session_weight_cache(FILE *out)
{
    static Model model;
    const Arm *arm = &job.arms[only_arm];
    char part[4300];
    snprintf(part, sizeof part, "%s.part", arm->cache);
    open_model(&model, arm->path, arm->signature, part, false);
    if (access(part, F_OK))
        fail("unsupported", "XNNPACK has no weights of this model to keep in a cache");
    if (rename(part, arm->cache))
        fail("os-error", "%s: %s", part, strerror(errno));
    fputs("{}", out);
}

static void session_cold(FILE *out)
{
    static Model model;
    Arm *arm = &job.arms[only_arm];
    warm_up_runtime();
    if (*arm->cache)
        drop_from_page_cache(arm->cache);
    double resident = drop_from_page_cache(arm->path);
    open_model(&model, arm->path, arm->signature, arm->cache, false);
    fprintf(out, "{\"load_ns\":%lld,\"resident_share\":", (long long)load_ns(&model));
    if (resident < 0)
        fputs("null}", out);
    else
        fprintf(out, "%.6f}", resident);
}

static int by_value(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

typedef struct {
    int64_t *values;
    size_t count, room;
} Series;

static void append(Series *series, int64_t value)
{
    if (series->count == series->room) {
        series->room = series->room ? 2 * series->room : 4096;
        series->values = realloc(series->values, series->room * sizeof *series->values);
        if (!series->values)
            fail("out-of-memory", "out of memory");
    }
    series->values[series->count++] = value;
}

static char *cold_text[MAX_ARMS]; /* what the cold children said, in the parent and its later child */

static long long run_queue_delay_ns(void)
{
    char *text = read_text("/proc/self/schedstat");
    char *second = text ? strchr(text, ' ') : NULL;
    return second ? atoll(second) : -1;
}

static void hash_outputs(Model *m)
{
    Sha256 sha;
    sha256_start(&sha);
    for (size_t k = 0; k < m->output_count; k++) {
        void *at;
        DO(LockTensorBuffer, m->out[k], &at, 0);
        sha256_add(&sha, at, m->outputs[k].bytes);
        DO(UnlockTensorBuffer, m->out[k]);
    }
    sha256_end(&sha, m->output_sha256);
}

/* Inferences per sample. Arms of about one speed get one size, so that what a batch costs beside
 * the inferences is the same share of both. */
static void batch_sizes(const Series *warmups, int64_t *inner)
{
    int64_t typical[MAX_ARMS], least = INT64_MAX, most = 1;
    for (int a = 0; a < job.arm_count; a++) {
        size_t count = warmups[a].count;
        int64_t *sorted = allocate(count, sizeof *sorted);
        memcpy(sorted, warmups[a].values, count * sizeof *sorted);
        qsort(sorted, count, sizeof *sorted, by_value);
        typical[a] = sorted[count / 2] > 1 ? sorted[count / 2] : 1;
        least = typical[a] < least ? typical[a] : least;
        most = typical[a] > most ? typical[a] : most;
        free(sorted);
    }
    for (int a = 0; a < job.arm_count; a++) {
        int64_t ns = most <= 2 * least ? least : typical[a];
        inner[a] = ns >= BATCH_BELOW_NS ? 1 : (BATCH_TARGET_NS + ns - 1) / ns;
    }
}

/* Load, first inference, warm-up, steady state, of one arm or of two in turn: in each round every
 * arm runs once, in shuffled order. Raw nanoseconds; nothing is summarised. */
static void session_latency(FILE *out)
{
    static const char *STATES[] = {"/sys/devices/system/cpu/cpufreq/policy*/stats/time_in_state"};
    static Model models[MAX_ARMS];
    static Series warmups[MAX_ARMS], walls[MAX_ARMS], cpus[MAX_ARMS], khz;
    int64_t first_ns[MAX_ARMS], inner[MAX_ARMS];
    char frequency[128];
    bool single = job.threads == 1;
    /* the CPU time of one thread is the cost of an inference only where there is one thread */
    clockid_t cpu = single ? CLOCK_THREAD_CPUTIME_ID : CLOCK_PROCESS_CPUTIME_ID;
    uint64_t order = job.order_seed;
    for (int a = 0; a < job.arm_count; a++) { /* load is measured with the file in the page cache */
        static char chunk[1 << 16];
        int file = open(job.arms[a].path, O_RDONLY | O_CLOEXEC);
        while (file >= 0 && read(file, chunk, sizeof chunk) > 0)
            ;
        close(file);
    }
    warm_up_runtime();
    int swap = job.arm_count > 1 && next_random(&order) >> 63;
    for (int k = 0; k < job.arm_count; k++) {
        int a = k ^ swap;
        open_model(&models[a], job.arms[a].path, job.arms[a].signature, job.arms[a].cache, false);
        fill_random(&models[a], job.seed);
        int64_t began = wall_ns();
        call(&models[a]);
        first_ns[a] = wall_ns() - began;
        hash_outputs(&models[a]); /* now, as a model may keep state */
    }
    int64_t end = wall_ns() + (int64_t)(job.warmup_s * 1e9);
    do
        for (int k = 0; k < job.arm_count; k++) {
            int64_t began = wall_ns();
            call(&models[k ^ swap]);
            append(&warmups[k ^ swap], wall_ns() - began);
        }
    while (wall_ns() < end);
    batch_sizes(warmups, inner);
    int watched = job.cpu_count ? job.cpus[0] : 0;
    for (int i = 1; i < job.cpu_count; i++)
        watched = job.cpus[i] < watched ? job.cpus[i] : watched;
    snprintf(frequency, sizeof frequency, "/sys/devices/system/cpu/cpu%d/cpufreq/scaling_cur_freq", watched);
    char *states, *states_after;
    size_t size;
    FILE *text = open_memstream(&states, &size);
    put_files(text, STATES, 1);
    fclose(text);
    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    long long delay = run_queue_delay_ns();
    long long rounds = 0;
    int64_t next_look = 0;
    end = wall_ns() + (int64_t)(job.session_s * 1e9);
    while (rounds < job.min_inferences || wall_ns() < end) {
        swap = job.arm_count > 1 && next_random(&order) >> 63;
        for (int k = 0; k < job.arm_count; k++) {
            int a = k ^ swap;
            Model *model = &models[a];
            int64_t cpu_began = clock_ns(cpu), began = wall_ns();
            for (int64_t i = inner[a]; i; i--)
                call(model);
            int64_t ended = wall_ns(), cpu_ended = clock_ns(cpu);
            append(&walls[a], ended - began);
            append(&cpus[a], cpu_ended - cpu_began);
        }
        rounds++;
        if (wall_ns() >= next_look) {
            const char *now = read_text(frequency);
            if (now)
                append(&khz, atoll(now));
            next_look = wall_ns() + 250000000;
        }
    }
    long long delayed = run_queue_delay_ns();
    getrusage(RUSAGE_SELF, &after);
    text = open_memstream(&states_after, &size);
    put_files(text, STATES, 1);
    fclose(text);
    double wall_sum = 0, cpu_sum = 0;
    fprintf(out, "{\"rounds\":%lld,\"order_seed\":%llu,\"arms\":{", rounds, (unsigned long long)job.order_seed);
    for (int a = 0; a < job.arm_count; a++) {
        Model *m = &models[a];
        for (size_t i = 0; i < walls[a].count; i++) {
            wall_sum += walls[a].values[i];
            cpu_sum += cpus[a].values[i];
        }
        if (a)
            putc(',', out);
        put_text(out, job.arms[a].name);
        fputs(":{\"wall_ns\":", out);
        put_numbers(out, walls[a].values, walls[a].count);
        fputs(",\"cpu_ns\":", out);
        put_numbers(out, cpus[a].values, cpus[a].count);
        fputs(",\"warmup_wall_ns\":", out);
        put_numbers(out, warmups[a].values, warmups[a].count);
        fprintf(out, ",\"inner_loops\":%lld,\"first_inference_ns\":%lld,\"load_ns\":%lld",
                (long long)inner[a], (long long)first_ns[a], (long long)load_ns(m));
        fprintf(out, ",\"load_parts_ns\":{\"environment\":%lld,\"model\":%lld,\"compile\":%lld,\"buffers\":%lld}",
                (long long)m->parts_ns[0], (long long)m->parts_ns[1], (long long)m->parts_ns[2],
                (long long)m->parts_ns[3]);
        fprintf(out, ",\"state\":\"%s\",\"cold\":%s,\"output_sha256\":\"%s\",\"inputs\":",
                m->stateful ? "kept" : "none", cold_text[a], m->output_sha256);
        put_tensors(out, m->inputs, m->input_count);
        fputs(",\"outputs\":", out);
        put_tensors(out, m->outputs, m->output_count);
        putc('}', out);
    }
    double share = cpu_sum / wall_sum;
    fprintf(out, "},\"cpu_clock\":\"%s\",\"cpu_share\":%.6f,\"contended\":%s,\"runtime_load_ns\":%lld",
            single ? "thread" : "process", share, single && share < CONTENDED_BELOW ? "true" : "false",
            (long long)runtime_load_ns);
    fputs(",\"frequency_khz\":", out);
    put_numbers(out, khz.values, khz.count);
    if (delay < 0 || delayed < 0)
        fputs(",\"run_queue_delay_ns\":null", out);
    else
        fprintf(out, ",\"run_queue_delay_ns\":%lld", delayed - delay);
    fprintf(out, ",\"involuntary_switches\":%ld,\"major_faults\":%ld",
            after.ru_nivcsw - before.ru_nivcsw, after.ru_majflt - before.ru_majflt);
    /* the host makes time_in_state of these; the counts are in ticks */
    fprintf(out, ",\"ticks_per_s\":%ld,\"states_before\":%s,\"states_after\":%s}", sysconf(_SC_CLK_TCK),
            states, states_after);
}

typedef struct {
    long long anon, rss, peak, file; /* bytes; -1 = unknown */
    bool rollup;
} Memory;

static long long kib(const char *text, const char *key)
{
    long long value = number_after(text, key);
    return value < 0 ? -1 : value * 1024;
}

static bool ends_with(const char *line, const char *path)
{
    size_t length = strlen(line), tail = strlen(path);
    return tail && length > tail && line[length - tail - 1] == ' ' && !strcmp(line + length - tail, path);
}

/* What this process maps of a model and its weight cache and has in memory, in bytes: one pass over
 * smaps, a line at a time. */
static long long mapped_bytes(const Arm *arm)
{
    static char chunk[1 << 14], line[4400];
    size_t length = 0;
    long long total = 0;
    ssize_t got;
    bool inside = false;
    int file = open("/proc/self/smaps", O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return -1;
    while ((got = read(file, chunk, sizeof chunk)) > 0)
        for (ssize_t i = 0; i < got; i++) {
            if (chunk[i] != '\n') {
                if (length < sizeof line - 1)
                    line[length++] = chunk[i];
                continue;
            }
            line[length] = 0;
            if (isdigit((unsigned char)*line) || (*line >= 'a' && *line <= 'f')) /* the mapping's own line */
                inside = ends_with(line, arm->path) || ends_with(line, arm->cache);
            else if (inside && !strncmp(line, "Rss:", 4))
                total += atoll(line + 4) * 1024;
            length = 0;
        }
    close(file);
    return total;
}

/* As memory_bytes in worker.py: `anon` from smaps_rollup, which walks the page tables, where it is. */
static Memory memory_of(const Arm *arm)
{
    Memory found;
    const char *text = read_text("/proc/self/smaps_rollup");
    found.anon = kib(text, "\nAnonymous:");
    found.rollup = found.anon >= 0;
    text = read_text("/proc/self/status");
    found.rss = kib(text, "\nVmRSS:");
    found.peak = kib(text, "\nVmHWM:");
    if (!found.rollup)
        found.anon = kib(text, "\nRssAnon:");
    found.file = mapped_bytes(arm);
    return found;
}

static void put_bytes(FILE *out, const char *name, long long bytes)
{
    if (bytes < 0)
        fprintf(out, "\"%s\":null,", name);
    else
        fprintf(out, "\"%s\":%lld,", name, bytes);
}

static void put_growth(FILE *out, const char *name, long long before, long long after)
{
    if (before < 0 || after < 0)
        fprintf(out, "\"%s\":null,", name);
    else
        fprintf(out, "\"%s\":%lld,", name, after - before);
}

/* What the model adds to a process whose runtime is loaded and has run once, in bytes. */
static void session_memory(FILE *out)
{
    static const char *const STAGES[4] = {"before_load", "after_load", "after_first", "steady"};
    static Model model;
    static Memory at[4];
    const Arm *arm = &job.arms[0];
    long long overhead = kib(read_text("/proc/self/status"), "\nVmRSS:");
    warm_up_runtime();
    memory_of(arm); /* once for practice: the reading itself takes some memory the first time */
#ifdef __GLIBC__
    malloc_trim(0); /* else a model that fits into what loading left free seems to cost nothing */
#endif
    int file = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC); /* VmHWM = RSS, proc(5) */
    bool peak_is_reset = file >= 0 && write(file, "5", 1) == 1;
    if (file >= 0)
        close(file);
    at[0] = memory_of(arm);
    open_model(&model, arm->path, arm->signature, arm->cache, false);
    at[1] = memory_of(arm);
    fill_random(&model, job.seed);
    call(&model);
    at[2] = memory_of(arm);
    for (int i = 0; i < 5; i++)
        call(&model);
    at[3] = memory_of(arm);
    fputs("{\"stages\":{", out);
    for (int i = 0; i < 4; i++) {
        fprintf(out, "%s\"%s\":{", i ? "," : "", STAGES[i]);
        put_bytes(out, "anon", at[i].anon);
        put_bytes(out, "rss", at[i].rss);
        put_bytes(out, "peak", at[i].peak);
        put_bytes(out, "file", at[i].file);
        fprintf(out, "\"anon_source\":\"%s\"}", at[i].rollup ? "smaps_rollup" : "status");
    }
    fputs("},", out);
    put_growth(out, "anon_bytes", at[0].anon, at[3].anon);
    put_growth(out, "peak_bytes", peak_is_reset ? at[0].peak : -1, at[3].peak);
    put_bytes(out, "file_bytes", at[3].file);
    put_bytes(out, "overhead_bytes", overhead);
    fprintf(out, "\"anon_source\":\"%s\"}", at[3].rollup ? "smaps_rollup" : "status");
}

/* A write that came to nothing: a full disk is the board's fault, not the model's. */
static void write_failed(const char *path)
{
    bool full = errno == ENOSPC || errno == EDQUOT;
    fail(full ? "disk-full" : "os-error", "%s: %s", path, strerror(errno));
}

/* Outputs for given raw input bytes: inference after inference, in each the tensors in order. With
 * first_input they are a piece of the samples, from that one on. */
static void session_outputs(FILE *out)
{
    static Model model;
    size_t order[MAX_TENSORS];
    char path[4096], part[4200], hex[65];
    long long reloads = 0;
    Sha256 sha;
    open_model(&model, job.arms[0].path, job.arms[0].signature, job.arms[0].cache, false);
    if ((size_t)job.input_name_count != model.input_count)
        fail("bad-request", "the model has %zu inputs, the samples %d", model.input_count, job.input_name_count);
    for (size_t k = 0; k < model.input_count; k++) {
        size_t found = 0;
        while (found < model.input_count && strcmp(model.inputs[found].name, job.input_names[k]))
            found++;
        if (model.input_count == 1)
            found = 0; /* one tensor needs no name */
        if (found == model.input_count)
            fail("bad-request", "the model has no input %s", job.input_names[k]);
        order[k] = found;
    }
    snprintf(path, sizeof path, "%s/outputs-%s.bin", job.job_dir, job.tag);
    snprintf(part, sizeof part, "%s.part", path);
    FILE *source = fopen(job.inputs, "rbe"), *target = fopen(part, "wbe");
    if (!source)
        fail("error", "%s: %s", job.inputs, strerror(errno));
    if (!target)
        write_failed(part);
    off_t step = 0;
    for (size_t k = 0; k < model.input_count; k++)
        step += model.inputs[k].bytes;
    if (fseeko(source, job.first_input < 0 ? 0 : job.first_input * step, SEEK_SET))
        fail("error", "%s: %s", job.inputs, strerror(errno));
    sha256_start(&sha);
    for (long long n = 0; n < job.input_count; n++) {
        void *at;
        if (model.stateful && n) { /* the C API cannot reset variable tensors */
            DO(DestroyCompiledModel, model.compiled);
            open_model(&model, job.arms[0].path, job.arms[0].signature, job.arms[0].cache, false);
            reloads++;
        }
        for (size_t k = 0; k < model.input_count; k++) {
            Tensor *tensor = &model.inputs[order[k]];
            DO(LockTensorBuffer, tensor->handle, &at, 1);
            if (fread(at, 1, tensor->bytes, source) != tensor->bytes)
                fail("bad-request", "the samples end in the middle of input %s", tensor->name);
            DO(UnlockTensorBuffer, tensor->handle);
        }
        call(&model);
        for (size_t k = 0; k < model.output_count; k++) {
            DO(LockTensorBuffer, model.out[k], &at, 0);
            sha256_add(&sha, at, model.outputs[k].bytes);
            if (fwrite(at, 1, model.outputs[k].bytes, target) != model.outputs[k].bytes)
                write_failed(part);
            DO(UnlockTensorBuffer, model.out[k]);
        }
    }
    if (job.first_input < 0 && getc(source) != EOF)
        fail("bad-request", "the samples are longer than the model's inputs");
    if (fflush(target) || fsync(fileno(target)) || fclose(target) || rename(part, path))
        write_failed(part);
    fputs("{\"outputs\":", out);
    put_tensors(out, model.outputs, model.output_count);
    fprintf(out, ",\"count\":%lld,\"reloads\":%lld,\"size\":%lld,\"path\":", job.input_count, reloads,
            (long long)sha.bytes);
    put_text(out, path);
    sha256_end(&sha, hex);
    fprintf(out, ",\"sha256\":\"%s\"}", hex);
}

/* Times of single operators by the runtime's profiler, in order of execution: recording takes 0.1 ms
 * per inference, so these are shares of it and never its latency. Whole microseconds. */
static void session_ops(FILE *out)
{
    enum { WARM_UP = 5, PROFILED = 30 };
    typedef struct { int type; char *name; int64_t ns[PROFILED]; } Operation;
    static Model model;
    Operation *ops = NULL;
    int count = 0;
    Handle profiler;
    open_model(&model, job.arms[0].path, job.arms[0].signature, job.arms[0].cache, true);
    fill_random(&model, job.seed);
    if (model.calls_graphs)
        fail("unsupported", "operators of inner graphs are counted twice by the profiler");
    DO(CompiledModelGetProfiler, model.compiled, &profiler);
    for (int n = -WARM_UP; n < PROFILED; n++) {
        int found, k = 0;
        DO(ResetProfiler, profiler);
        DO(StartProfiler, profiler);
        int64_t began = wall_ns();
        call(&model);
        int64_t elapsed = wall_ns() - began;
        DO(StopProfiler, profiler);
        DO(GetNumProfilerEvents, profiler, &found);
        ProfilerEvent *events = allocate(found, sizeof *events);
        if (found)
            DO(GetProfilerEvents, profiler, found, events);
        if (n == -WARM_UP)
            ops = allocate(found, sizeof *ops);
        for (int i = 0; i < found; i++) {
            ProfilerEvent *event = &events[i];
            const char *name = event->tag ? event->tag : "";
            /* 2: an operator; 8: inside a delegate (tflite/core/api/profiler.h). The others are no
             * operators, and some carry garbage. */
            if (event->type != 2 && event->type != 8)
                continue;
            if (n == -WARM_UP)
                ops[count++] = (Operation){event->type, strdup(name), {0}};
            if (k == count || ops[k].type != event->type || strcmp(ops[k].name, name))
                fail("unsupported", "the profiler names other operators in each inference");
            if ((int64_t)event->elapsed_us * 1000 > elapsed)
                fail("unsupported", "the profiler says that an operator took longer than its inference");
            if (n >= 0)
                ops[k].ns[n] = (int64_t)event->elapsed_us * 1000;
            k++;
        }
        if (k != count)
            fail("unsupported", "the profiler names other operators in each inference");
        free(events);
    }
    if (!count)
        fail("unsupported", "the profiler names no operator");
    fprintf(out, "{\"inferences\":%d,\"profiler\":true,\"ops\":[", PROFILED);
    for (int k = 0; k < count; k++) {
        fprintf(out, "%s{\"index\":%d,\"where\":\"%s\",\"name\":", k ? "," : "", k,
                ops[k].type == 2 ? "builtin" : "delegate");
        put_text(out, ops[k].name);
        fputs(",\"ns\":", out);
        put_numbers(out, ops[k].ns, PROFILED);
        putc('}', out);
    }
    fputs("]}", out);
}

enum { COUNTED = 7, UNCOUNTED = 3 }; /* as in worker.py */

/* A counter of this thread's instructions in user space, or -1 with `why`. As in instructions.py. */
static int open_counter(char *why, size_t room)
{
    struct perf_event_attr wanted;
    memset(&wanted, 0, sizeof wanted);
    wanted.type = PERF_TYPE_HARDWARE;
    wanted.size = PERF_ATTR_SIZE_VER0;
    wanted.config = PERF_COUNT_HW_INSTRUCTIONS;
    wanted.read_format = PERF_FORMAT_TOTAL_TIME_ENABLED | PERF_FORMAT_TOTAL_TIME_RUNNING;
    wanted.exclude_kernel = wanted.exclude_hv = 1;
    int file = (int)syscall(SYS_perf_event_open, &wanted, 0, -1, -1, 0UL), error = errno;
    if (file >= 0)
        return file;
    const char *level = read_text("/proc/sys/kernel/perf_event_paranoid");
    if (error == ENOENT || error == ENODEV || error == EOPNOTSUPP)
        snprintf(why, room, "this CPU, or the machine it is emulated by, has no counter of instructions");
    else if (error != EACCES && error != EPERM)
        snprintf(why, room, "instructions cannot be counted (perf_event_open: %s)", strerror(error));
    else if (level && atoi(level) <= 2)
        snprintf(why, room, "a sandbox forbids counting instructions (perf_event_open: Operation not permitted)");
    else
        snprintf(why, room, "the kernel forbids counting instructions (kernel.perf_event_paranoid is %.*s): "
                 "on the board, sudo sysctl kernel.perf_event_paranoid=2",
                 level ? (int)strcspn(level, "\n") : 7, level ? level : "unknown");
    return -1;
}

/* Instructions of one inference (of none without a model) and of reading the counter. */
static int64_t counted(int file, Model *model)
{
    uint64_t before[3], after[3];
    bool fine = read(file, before, sizeof before) == sizeof before;
    if (model)
        call(model);
    if (!fine || read(file, after, sizeof after) != sizeof after)
        fail("unsupported", "the counter of instructions cannot be read");
    if (after[1] != after[2])
        fail("unsupported", "the counter of instructions was shared with others, or the thread moved to a CPU "
             "of another kind (stay on one kind by affinity)");
    return (int64_t)(after[0] - before[0]);
}

static void session_instructions(FILE *out)
{
    static Model model;
    int64_t counts[UNCOUNTED + COUNTED], overhead = INT64_MAX;
    char why[256];
    if (job.threads != 1)
        fail("unsupported", "instructions are counted with one thread only: others spin as they wait");
    int file = open_counter(why, sizeof why);
    if (file < 0)
        fail("unsupported", "%s", why);
    warm_up_runtime();
    open_model(&model, job.arms[0].path, job.arms[0].signature, job.arms[0].cache, false);
    fill_random(&model, job.seed);
    for (int n = 0; n < COUNTED; n++) {
        int64_t empty = counted(file, NULL);
        overhead = empty < overhead ? empty : overhead;
    }
    if (!overhead)
        fail("unsupported", "the counter of instructions stands still");
    for (int n = 0; n < UNCOUNTED + COUNTED; n++)
        counts[n] = counted(file, &model);
    fputs("{\"counts\":", out);
    put_numbers(out, counts + UNCOUNTED, COUNTED);
    fprintf(out, ",\"overhead\":%lld,\"counter\":\"perf_event_open\",\"fixed_addresses\":%s,\"state\":\"%s\",\"inputs\":",
            (long long)overhead, personality(0xffffffff) & ADDR_NO_RANDOMIZE ? "true" : "false",
            model.stateful ? "kept" : "none");
    put_tensors(out, model.inputs, model.input_count);
    fputs(",\"outputs\":", out);
    put_tensors(out, model.outputs, model.output_count);
    putc('}', out);
}

/* Start anew without address space randomisation, or return where that is refused. */
static void fix_addresses(char **argv)
{
    int now = personality(0xffffffff);
    if (now == -1 || now & ADDR_NO_RANDOMIZE || personality(now | ADDR_NO_RANDOMIZE) == -1)
        return;
    execv(argv[0], argv);
    personality(now);
}

static const struct { const char *kind; void (*run)(FILE *); } SESSIONS[] = {
    {"instructions", session_instructions},
    {"self-test", session_self_test}, {"cold", session_cold},       {"latency", session_latency},
    {"memory", session_memory},       {"outputs", session_outputs}, {"ops", session_ops}};

static void pin(void)
{
    cpu_set_t wanted, found;
    CPU_ZERO(&wanted);
    for (int i = 0; i < job.cpu_count; i++)
        CPU_SET(job.cpus[i], &wanted);
    /* the kernel passes over CPUs that are not there */
    if (sched_setaffinity(0, sizeof wanted, &wanted) || sched_getaffinity(0, sizeof found, &found) ||
        !CPU_EQUAL(&wanted, &found))
        fail("bad-request", "it may not run on all of the CPUs in affinity");
}

/* ------------------------------------------------------------------ the parent: supervisor */

typedef struct {
    char *text; /* what the child wrote, NUL at its end */
    size_t size;
    char tail[STDERR_TAIL + 1];
    int status;
    bool timed_out;
} Outcome;

static void run_in_child(void (*session)(FILE *), pid_t parent)
{
    char *data;
    size_t size;
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* no orphan keeps the board busy */
    if (getppid() != parent)
        _exit(2);
    struct rlimit none = {0, 0};
    setrlimit(RLIMIT_CORE, &none);
    int file = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (file >= 0) { /* of the two processes, the kernel shall take this one */
        if (write(file, "1000", 4) != 4)
            fputs("runner: oom_score_adj cannot be set\n", stderr);
        close(file);
    }
    if (job.cpu_count)
        pin();
    FILE *out = open_memstream(&data, &size);
    if (!out)
        fail("out-of-memory", "out of memory");
    putc('+', out);
    session(out);
    if (fclose(out))
        fail("out-of-memory", "out of memory");
    for (size_t done = 0; done < size;) {
        ssize_t wrote = write(result_pipe, data + done, size - done);
        if (wrote < 0)
            _exit(2);
        done += wrote;
    }
    _exit(0); /* without the runtime's destructors */
}

/* Runs one session in a fresh process and waits for it, at most until `deadline` (wall_ns). Returns
 * whether it gave data: `text`, after its '+'. */
static bool supervise(void (*session)(FILE *), int64_t deadline, Outcome *found)
{
    Outcome outcome = {NULL, 0, "", 0, false};
    int result[2], errors[2];
    size_t room = 0, tail = 0;
    pid_t parent = getpid();
    if (pipe2(result, O_CLOEXEC) || pipe2(errors, O_CLOEXEC))
        stop(BUG, "bug", NULL, "pipe: %s", strerror(errno));
    fflush(stdout);
    pid_t child = fork();
    if (child < 0)
        stop(BUG, "bug", NULL, "fork: %s", strerror(errno));
    if (child == 0) {
        result_pipe = result[1];
        dup2(errors[1], 2);
        dup2(2, 1); /* whatever a runtime prints is a log */
        run_in_child(session, parent);
    }
    close(result[1]);
    close(errors[1]);
    struct pollfd wait[2] = {{result[0], POLLIN, 0}, {errors[0], POLLIN, 0}};
    while (wait[0].fd >= 0 || wait[1].fd >= 0) {
        int64_t left_ms = (deadline - wall_ns()) / 1000000 + 1;
        if (left_ms <= 0 && !outcome.timed_out) {
            outcome.timed_out = true;
            kill(child, SIGKILL);
        }
        int ready = poll(wait, 2, outcome.timed_out ? 1000 : left_ms > 60000 ? 60000 : (int)left_ms);
        if (ready == 0 && outcome.timed_out)
            break; /* something the runtime started holds the pipe open */
        if (ready <= 0)
            continue;
        if (wait[0].revents) {
            if (outcome.size + 65536 > room) {
                room = room ? 2 * room : 1 << 17;
                outcome.text = realloc(outcome.text, room);
                if (!outcome.text)
                    stop(BUG, "bug", NULL, "out of memory");
            }
            ssize_t got = read(result[0], outcome.text + outcome.size, 65535);
            if (got > 0)
                outcome.size += got;
            else
                wait[0].fd = -1;
        }
        if (wait[1].revents) {
            char chunk[STDERR_TAIL / 2];
            ssize_t got = read(errors[0], chunk, sizeof chunk);
            if (got <= 0) {
                wait[1].fd = -1;
                continue;
            }
            if (tail + got > STDERR_TAIL) {
                size_t drop = tail + got - STDERR_TAIL;
                memmove(outcome.tail, outcome.tail + drop, tail - drop);
                tail -= drop;
            }
            for (ssize_t i = 0; i < got; i++)
                outcome.tail[tail++] = chunk[i] ? chunk[i] : ' ';
        }
    }
    outcome.tail[tail] = 0;
    if (outcome.text)
        outcome.text[outcome.size] = 0;
    close(result[0]);
    close(errors[0]);
    waitpid(child, &outcome.status, 0);
    *found = outcome;
    return !outcome.status && outcome.size && outcome.text[0] == '+';
}

static long long oom_kills(void) { return number_after(read_text("/proc/vmstat"), "\noom_kill "); }

/* Why a session has no data -> "what", the message, and the code it means. */
static int explain(const Outcome *o, bool killed_by_oom, const char **what, char message[2048])
{
    int number = WIFSIGNALED(o->status) ? WTERMSIG(o->status) : 0;
    if (o->timed_out) {
        *what = "timeout";
        snprintf(message, 2048, "the session was stopped after %.1f s", job.limit_s);
        return OVER_BUDGET;
    }
    if (number == SIGKILL && killed_by_oom) {
        *what = "out-of-memory";
        snprintf(message, 2048, "the kernel killed the session: out of memory");
        return WORKER_FAILED;
    }
    if (number) {
        bool someone = number == SIGKILL || number == SIGTERM || number == SIGINT || number == SIGHUP;
        *what = someone ? "killed" : "crash";
        snprintf(message, 2048, someone ? "someone killed the session with %s" : "the session crashed with %s",
                 strsignal(number));
        return WORKER_FAILED;
    }
    if (o->size > 2 && o->text[0] == '-') {
        *what = o->text + 1;
        snprintf(message, 2048, "%s", o->text + 1 + strlen(*what) + 1);
        if (!strcmp(*what, "bad-request"))
            return BAD_JOB;
        if (!strcmp(*what, "disk-full"))
            return DISK_FULL;
        if (!strcmp(*what, "os-error"))
            return UNUSABLE;
        return WORKER_FAILED;
    }
    *what = "error";
    snprintf(message, 2048, "the session ended with code %d", WEXITSTATUS(o->status));
    return WORKER_FAILED;
}

static void check_file(const char *what, const char *path, long long size, const char *sha256)
{
    static char chunk[1 << 16];
    struct stat status;
    char hex[65];
    ssize_t got;
    Sha256 sha;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0 || fstat(file, &status))
        stop(DATA_MISMATCH, "data-mismatch", NULL, "%s %s: %s", what, path, strerror(errno));
    if (status.st_size != size)
        stop(DATA_MISMATCH, "data-mismatch", NULL, "%s %s has %lld bytes, the job says %lld", what, path,
             (long long)status.st_size, size);
    sha256_start(&sha);
    while ((got = read(file, chunk, sizeof chunk)) > 0)
        sha256_add(&sha, chunk, got);
    close(file);
    sha256_end(&sha, hex);
    if (strcmp(hex, sha256))
        stop(DATA_MISMATCH, "data-mismatch", NULL, "%s %s has sha256 %s, the job says %s", what, path, hex, sha256);
}

/* dlopen calls a library of another machine "no such file": look before it is loaded. */
static void check_elf(const char *path)
{
    unsigned char head[20] = {0};
    int file = open(path, O_RDONLY | O_CLOEXEC);
    bool elf = file >= 0 && read(file, head, sizeof head) == sizeof head && !memcmp(head, "\x7f" "ELF", 4);
    close(file);
    int machine = head[18] | head[19] << 8;
    if (!elf)
        stop(NO_RUNTIME, "no-runtime", NULL, "%s is no ELF library", path);
    if (machine != ELF_MACHINE)
        stop(NO_RUNTIME, "no-runtime", NULL, "the library is for ELF machine %d, this board is %s (%d)", machine,
             MACHINE, ELF_MACHINE);
}

static void run_session(void)
{
    int64_t deadline = wall_ns() + (int64_t)(job.limit_s * 1e9);
    void (*session)(FILE *) = NULL;
    struct statvfs disk;
    char *before, *reply, message[2048] = "", path[4096], part[4200];
    size_t size;
    const char *what = NULL;
    int code = OK;
    for (size_t i = 0; i < sizeof SESSIONS / sizeof *SESSIONS; i++)
        if (!strcmp(job.kind, SESSIONS[i].kind))
            session = SESSIONS[i].run;
    if (!session)
        stop(BAD_JOB, "bad-job", NULL, "no session is called %s", job.kind);
    int lease = take_lease();
    write_lease(lease, clock_ns(CLOCK_BOOTTIME) / 1e9);
    for (int a = 0; a < job.arm_count; a++)
        check_file("model", job.arms[a].path, job.arms[a].size, job.arms[a].sha256);
    check_file("runtime", job.runtime, job.runtime_size, job.runtime_sha256);
    check_elf(job.runtime);
    if (job.inputs)
        check_file("inputs", job.inputs, job.inputs_size, job.inputs_sha256);
    if (statvfs(job.job_dir, &disk))
        stop(UNUSABLE, "os-error", NULL, "%s: %s", job.job_dir, strerror(errno));
    if ((double)disk.f_bavail * disk.f_frsize < job.min_free_bytes)
        stop(DISK_FULL, "disk-full", NULL, "%s has %.0f bytes free, %lld are needed", job.job_dir,
             (double)disk.f_bavail * disk.f_frsize, job.min_free_bytes);

    FILE *out = open_memstream(&before, &size);
    put_files(out, job.globs, job.glob_count);
    fclose(out);
    long long kills = oom_kills();
    Outcome outcome = {NULL, 0, "", 0, false};
    bool failed = false;
    for (only_arm = 0; only_arm < job.arm_count && !failed; only_arm++) {
        if (job.weight_cache && access(job.arms[only_arm].cache, F_OK))
            failed = !supervise(session_weight_cache, deadline, &outcome);
        if (session == session_latency && !failed) {
            failed = !supervise(session_cold, deadline, &outcome);
            cold_text[only_arm] = failed ? NULL : outcome.text + 1;
        }
    }
    failed = failed || !supervise(session, deadline, &outcome);
    if (failed)
        code = explain(&outcome, kills >= 0 && oom_kills() > kills, &what, message);

    out = open_memstream(&reply, &size);
    fprintf(out, "{\"schema\":%d,\"code\":%d,\"error\":%s,\"message\":", SCHEMA, code,
            code == OK             ? "null"
            : code == OVER_BUDGET  ? "\"budget\""
            : code == BAD_JOB      ? "\"bad-request\""
            : code == DISK_FULL    ? "\"disk-full\""
            : code == UNUSABLE     ? "\"os-error\""
                                   : "\"worker-failed\"");
    put_text(out, message);
    fputs(",\"identity\":", out);
    put_text(out, job.identity);
    fputs(",\"tag\":", out);
    put_text(out, job.tag);
    fputs(",\"kind\":", out);
    put_text(out, job.kind);
    fputs(",\"arms\":[", out);
    for (int a = 0; a < job.arm_count; a++) {
        if (a)
            putc(',', out);
        put_text(out, job.arms[a].name);
    }
    fprintf(out, "],\"data\":%s,\"cause\":", failed ? "null" : outcome.text + 1);
    if (failed) {
        fputs("{\"what\":", out);
        put_text(out, what);
        fputs(",\"message\":", out);
        put_text(out, message);
        fputs(",\"stderr\":", out);
        put_text(out, outcome.tail);
        if (WIFSIGNALED(outcome.status))
            fprintf(out, ",\"signal\":%d", WTERMSIG(outcome.status));
        putc('}', out);
    } else
        fputs("null", out);
    fprintf(out, ",\"before\":%s,\"after\":", before);
    put_files(out, job.globs, job.glob_count);
    fputs("}\n", out);
    fclose(out);
    write_lease(lease, clock_ns(CLOCK_BOOTTIME) / 1e9 + job.lease_s);
    if (!failed && strcmp(job.kind, "self-test")) { /* a host that vanished finds it again */
        snprintf(path, sizeof path, "%s/session-%s.json", job.job_dir, job.tag);
        snprintf(part, sizeof part, "%s.part", path);
        FILE *file = fopen(part, "wbe");
        if (!file || fwrite(reply, 1, size, file) != size || fflush(file) || fsync(fileno(file)) ||
            fclose(file) || rename(part, path)) {
            fprintf(stderr, "runner: %s was not kept: %s\n", path, strerror(errno));
            unlink(part);
        }
    }
    close(lease); /* before the answer, which waits for whoever reads it */
    if (fwrite(reply, 1, size, stdout) != size || fflush(stdout))
        exit(BUG);
    exit(code);
}

/* --------------------------------------------------------------------------- command line */

static bool is_word(const char *text) /* what may stand in a JSON string or a file name as it is */
{
    for (const char *c = text; *c; c++)
        if (!isalnum((unsigned char)*c) && !strchr("-_.@ ", *c))
            return false;
    return *text && strcmp(text, ".") && strcmp(text, "..");
}

static void parse_job(int argc, char **argv)
{
    job.threads = 1;
    job.first_input = -1; /* all of them */
    job.kernel = job.identity = "";
    for (int i = 0; i < argc; i++) {
        char *value = strchr(argv[i], '=');
        if (!value)
            stop(BAD_JOB, "bad-job", NULL, "%s is not KEY=VALUE", argv[i]);
        *value++ = 0;
        const char *key = argv[i];
        Arm *arm = job.arm_count ? &job.arms[job.arm_count - 1] : NULL;
        if (!strcmp(key, "arm")) {
            if (job.arm_count == MAX_ARMS)
                stop(BAD_JOB, "bad-job", NULL, "more than %d arms", MAX_ARMS);
            job.arms[job.arm_count].signature = "";
            job.arms[job.arm_count++].name = value;
        } else if (arm && !strcmp(key, "model"))
            arm->path = realpath(value, NULL) ? realpath(value, NULL) : value; /* as smaps spells it */
        else if (arm && !strcmp(key, "signature"))
            arm->signature = value;
        else if (arm && !strcmp(key, "size"))
            arm->size = atoll(value);
        else if (arm && !strcmp(key, "sha256"))
            arm->sha256 = value;
        else if (!strcmp(key, "id")) job.id = value;
        else if (!strcmp(key, "owner")) job.owner = value;
        else if (!strcmp(key, "work_dir")) job.work_dir = value;
        else if (!strcmp(key, "job_dir")) job.job_dir = value;
        else if (!strcmp(key, "tag")) job.tag = value;
        else if (!strcmp(key, "kind")) job.kind = value;
        else if (!strcmp(key, "identity")) job.identity = value;
        else if (!strcmp(key, "kernel")) job.kernel = value;
        else if (!strcmp(key, "runtime")) job.runtime = value;
        else if (!strcmp(key, "runtime_size")) job.runtime_size = atoll(value);
        else if (!strcmp(key, "runtime_sha256")) job.runtime_sha256 = value;
        else if (!strcmp(key, "self_test")) job.self_test = value;
        else if (!strcmp(key, "inputs")) job.inputs = value;
        else if (!strcmp(key, "inputs_size")) job.inputs_size = atoll(value);
        else if (!strcmp(key, "inputs_sha256")) job.inputs_sha256 = value;
        else if (!strcmp(key, "input_count")) job.input_count = atoll(value);
        else if (!strcmp(key, "first_input")) job.first_input = atoll(value);
        else if (!strcmp(key, "input") && job.input_name_count < MAX_TENSORS)
            job.input_names[job.input_name_count++] = value;
        else if (!strcmp(key, "read") && job.glob_count < 64)
            job.globs[job.glob_count++] = value;
        else if (!strcmp(key, "cpu") && job.cpu_count < MAX_CPUS && (unsigned)atoi(value) < CPU_SETSIZE)
            job.cpus[job.cpu_count++] = atoi(value);
        else if (!strcmp(key, "threads")) job.threads = atoi(value);
        else if (!strcmp(key, "min_inferences")) job.min_inferences = atoll(value);
        else if (!strcmp(key, "min_free_bytes")) job.min_free_bytes = atoll(value);
        else if (!strcmp(key, "warmup_s")) job.warmup_s = atof(value);
        else if (!strcmp(key, "session_s")) job.session_s = atof(value);
        else if (!strcmp(key, "limit_s")) job.limit_s = atof(value);
        else if (!strcmp(key, "lease_s")) job.lease_s = atof(value);
        else if (!strcmp(key, "weight_cache")) job.weight_cache = atoi(value);
        else if (!strcmp(key, "order_seed")) job.order_seed = strtoull(value, NULL, 10);
        else if (!strcmp(key, "seed")) job.seed = strtoull(value, NULL, 10);
        else
            stop(BAD_JOB, "bad-job", NULL, "unknown key %s", key);
    }
    if (!job.id || !job.owner || !job.work_dir || !job.job_dir || !job.tag || !job.kind || !job.runtime ||
        !job.runtime_sha256 || !job.self_test || job.limit_s <= 0 || job.threads < 1)
        stop(BAD_JOB, "bad-job", NULL, "a key is missing");
    if (!is_word(job.id) || !is_word(job.owner) || !is_word(job.tag) || (*job.kernel && !is_word(job.kernel)))
        stop(BAD_JOB, "bad-job", NULL, "id, owner, tag or kernel is no plain word");
    for (int a = 0; a < job.arm_count; a++) {
        if (!job.arms[a].path || !job.arms[a].sha256 || !is_word(job.arms[a].name))
            stop(BAD_JOB, "bad-job", NULL, "arm %s has no model, sha256 or plain name", job.arms[a].name);
        if (job.weight_cache)
            snprintf(job.arms[a].cache, sizeof job.arms[a].cache, "%s/weights-%s", job.job_dir, job.arms[a].name);
        if (strpbrk(job.arms[a].cache, "\"\\"))
            stop(BAD_JOB, "bad-job", NULL, "a weight cache cannot lie in %s", job.job_dir);
    }
    bool one = !strcmp(job.kind, "memory") || !strcmp(job.kind, "outputs") ||
               !strcmp(job.kind, "ops") || !strcmp(job.kind, "instructions");
    if ((one && job.arm_count != 1) || (!strcmp(job.kind, "latency") && !job.arm_count))
        stop(BAD_JOB, "bad-job", NULL, "a %s session of %d arms", job.kind, job.arm_count);
    if (!strcmp(job.kind, "outputs") && (!job.inputs || !job.inputs_sha256))
        stop(BAD_JOB, "bad-job", NULL, "an outputs session needs inputs");
}

static void answer_read(const char *work_dir, int count, char **globs)
{
    struct statvfs disk;
    char no_counter[256] = "";
    int counter = open_counter(no_counter, sizeof no_counter);
    if (counter >= 0)
        close(counter);
    if (statvfs(work_dir, &disk))
        stop(UNUSABLE, "os-error", NULL, "%s: %s", work_dir, strerror(errno));
    printf("{\"schema\":%d,\"code\":0,\"error\":null,\"message\":\"\",\"machine\":\"%s\",\"bits\":%d,"
           "\"page_size_bytes\":%ld,\"cpus\":%ld,\"free_bytes\":%.0f,\"libc\":",
           SCHEMA, MACHINE, (int)sizeof(void *) * 8, sysconf(_SC_PAGESIZE), sysconf(_SC_NPROCESSORS_CONF),
           (double)disk.f_bavail * disk.f_frsize);
#ifdef __GLIBC__
    printf("\"%s\"", gnu_get_libc_version());
#else
    fputs("null", stdout);
#endif
    fputs(",\"no_instructions\":", stdout);
    put_text(stdout, no_counter);
    fputs(",\"board\":", stdout);
    put_files(stdout, (const char **)globs, count);
    puts("}");
    exit(fflush(stdout) ? BUG : OK);
}

int main(int argc, char **argv)
{
    if (argc > 3 && !strcmp(argv[1], "read"))
        answer_read(argv[2], argc - 3, argv + 3);
    if (argc > 6 && !strcmp(argv[1], "hold"))
        hold(argv + 2);
    if (argc == 4 && (!strcmp(argv[1], "end") || !strcmp(argv[1], "release"))) {
        if (!strcmp(argv[1], "release"))
            stop_holder(argv[2], argv[3]);
        end_lease(argv[2], argv[3]);
        printf("{\"schema\":%d,\"code\":0,\"error\":null,\"message\":\"\"}\n", SCHEMA);
        return fflush(stdout) ? BUG : OK;
    }
    if (argc > 2 && !strcmp(argv[1], "session")) {
        for (int i = 2; i < argc; i++)
            if (!strcmp(argv[i], "kind=instructions"))
                fix_addresses(argv);
        parse_job(argc - 2, argv + 2);
        run_session();
    }
    stop(BAD_JOB, "bad-job", NULL, "usage: runner read WORK_DIR GLOB... | session KEY=VALUE... | end WORK_DIR JOB | hold ... | release WORK_DIR JOB");
}
