package refusal

import "fmt"

// Panicked is what a log may say of a panic's value: the runtime's own words, or the type of what it was called with. That
// itself may hold anything, a key or a token too. A panic that was carried over from another goroutine tells this by itself,
// in a method Panicked, and its stack with it.
func Panicked(p any) string {
	switch x := p.(type) {
	case interface{ Panicked() string }:
		return x.Panicked()
	case interface{ RuntimeError() }:
		return fmt.Sprint(x)
	}
	return fmt.Sprintf("%T", p)
}
