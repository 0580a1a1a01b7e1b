/* The memory of children: see block.h. */
#define _GNU_SOURCE
#include "block.h"
#include "environment.h"
#include "launch.h"

#include <sys/mman.h>
#include <unistd.h>

enum {
    STACK_SIZE = 16 * 1024, /* the child's deepest frame is 1.5 KiB, no handler runs on it */
    BLOCK_SIZE = 64 * 1024, /* of a block that is kept for later launches */
    FREE_BLOCKS_MAX = 32,
};

static struct block *free_blocks;
static size_t free_count;

/* Written once, by whoever is first. */
static size_t page;

void block_init_locked(void)
{
    if (!page)
        page = (size_t)sysconf(_SC_PAGESIZE);
}

size_t block_free_count_locked(void)
{
    return free_count;
}

/* The guard page is the lowest: a stack that overflows faults in the child. */
static char *block_base(struct block *block)
{
    return (char *)block - STACK_SIZE - page;
}

void *block_stack(struct block *block, size_t *ret_size)
{
    *ret_size = STACK_SIZE;
    return (char *)block - STACK_SIZE;
}

static struct block *map_block(size_t size)
{
    size = (size + page - 1) / page * page;
    char *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (base == MAP_FAILED)
        return NULL;
    if (mprotect(base, page, PROT_NONE) < 0) {
        (void)munmap(base, size);
        return NULL;
    }
    struct block *block = (struct block *)(void *)(base + page + STACK_SIZE);
    block->size = size;
    return block;
}

/* Of the whole mapping, before it is rounded up. */
static size_t size_for(size_t arena_size)
{
    size_t size = page + STACK_SIZE + sizeof(struct block) + arena_size;
    return size > BLOCK_SIZE ? size : BLOCK_SIZE;
}

/* One of the usual size that has been given back, or NULL. */
static struct block *take_free_locked(size_t size)
{
    struct block *block = size == BLOCK_SIZE ? free_blocks : NULL;
    if (block) {
        free_blocks = block->next;
        free_count--;
        block->used = 0;
        block->environment = NULL;
    }
    return block;
}

/* A block whose arena holds arena_size bytes in 16-byte units, or NULL. Mapped without the mutex: the kernel
 * may have to wait for whoever is touching much of our memory. */
struct block *block_new(size_t arena_size)
{
    if (arena_size > SIZE_MAX / 2)
        return NULL;
    size_t size = size_for(arena_size);
    launch_lock();
    struct block *block = take_free_locked(size);
    launch_unlock();
    return block ? block : map_block(size);
}

/* One with a small arena, for who cannot let go of the mutex. */
struct block *block_new_locked(void)
{
    struct block *block = take_free_locked(size_for(0));
    return block ? block : map_block(size_for(0));
}

/* Memory from the arena, 16-byte aligned; NULL when it is used up. */
void *block_take(struct block *block, size_t size)
{
    size_t room = (size_t)(block_base(block) + block->size - block->arena);
    if (size > room - block->used)
        return NULL;
    void *taken = block->arena + block->used;
    size_t rounded = (size + 15) / 16 * 16;
    block->used = rounded > room - block->used ? room : block->used + rounded;
    return taken;
}

void block_free_locked(struct block *block)
{
    if (block->environment)
        environment_release_locked(block->environment);
    if (block->size <= BLOCK_SIZE && free_count < FREE_BLOCKS_MAX) {
        block->next = free_blocks;
        free_blocks = block;
        free_count++;
    } else {
        (void)munmap(block_base(block), block->size);
    }
}

void block_free(struct block *block)
{
    launch_lock();
    block_free_locked(block);
    launch_unlock();
}
