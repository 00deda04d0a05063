package rotation

import (
	"sync"
	"testing"
)

func TestCurrentTellsEveryReaderOnce(t *testing.T) {
	c := NewCurrent("a")
	value, stale := c.Get()
	if value != "a" {
		t.Fatalf("holds %q", value)
	}
	select {
	case <-stale:
		t.Fatal("stale before another value was set")
	default:
	}
	c.Set("b")
	<-stale
	if value, stale = c.Get(); value != "b" || c.Value() != "b" {
		t.Fatalf("holds %q", value)
	}
	select {
	case <-stale:
		t.Fatal("the new value is stale at once")
	default:
	}
}

func TestCurrentZeroValueAndConcurrentReaders(t *testing.T) {
	var c Current[int]
	const last = 1000
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for seen := -1; seen < last; {
				value, stale := c.Get()
				if value < seen {
					t.Errorf("went back from %d to %d", seen, value)
					return
				}
				if seen = value; seen < last {
					<-stale
				}
			}
		})
	}
	for i := range last + 1 {
		c.Set(i)
	}
	wg.Wait()
}
