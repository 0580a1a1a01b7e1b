/* The memory of one child: its stack, what it reads, and what it reads from. Blocks of the usual size are
 * kept for later launches. Under the table's mutex: launch.h.
 */
#ifndef AIOVSPAWN_BLOCK_H
#define AIOVSPAWN_BLOCK_H

#include "spawn.h"

struct environment;

/* The memory of one child: guard page, stack, then what it reads. */
struct block {
    struct block *next; /* in the list of free blocks */
    size_t size;        /* of the whole mapping, bytes */
    size_t used;        /* of the arena */
    struct environment *environment; /* a reference, for the child to read from; or NULL */
    struct spawn_request request;
    struct spawn_child child;
    _Alignas(16) char arena[];
};

void block_init_locked(void);
struct block *block_new(size_t arena_size);
struct block *block_new_locked(void);
void *block_take(struct block *block, size_t size);
void *block_stack(struct block *block, size_t *ret_size);
void block_free(struct block *block);
void block_free_locked(struct block *block);
size_t block_free_count_locked(void);

#endif
