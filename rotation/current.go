package rotation

import "sync"

// Current is the one subscription idiom of meshca: a value, and a channel that closes when the value is stale.
// There are no registries of listeners and no queues of updates: who was away sees the newest value, never a backlog.
//
// The zero Current holds the zero value of T. Values are shared by all readers and must not be changed after Set.
// All methods are safe for concurrent use.
type Current[T any] struct {
	mu    sync.Mutex
	value T
	stale chan struct{}
}

// NewCurrent returns a Current that holds v.
func NewCurrent[T any](v T) *Current[T] { return &Current[T]{value: v} }

// Get returns the value, and a channel that closes when another one is set.
func (c *Current[T]) Get() (T, <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stale == nil {
		c.stale = make(chan struct{})
	}
	return c.value, c.stale
}

// Value returns the value alone.
func (c *Current[T]) Value() T {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.value
}

// Set replaces the value and wakes everyone who waits on the old one's channel.
func (c *Current[T]) Set(v T) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.value = v
	if c.stale != nil {
		close(c.stale)
		c.stale = nil
	}
}
