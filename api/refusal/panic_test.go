package refusal_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/meshca/meshca/api/refusal"
)

type carried struct{}

func (carried) Panicked() string { return "what another goroutine met" }

func TestPanicked(t *testing.T) {
	met := func(f func()) (text string) {
		defer func() { text = refusal.Panicked(recover()) }()
		f()
		return ""
	}
	for want, f := range map[string]func(){
		"string":                     func() { panic("a-token") },
		"*errors.errorString":        func() { panic(errors.New("a-token")) },
		"what another goroutine met": func() { panic(carried{}) },
		"index out of range":         func() { var none []int; _ = none[len(none)] },
		"nil pointer dereference":    func() { var none *struct{ x int }; none.x++ },
	} {
		if got := met(f); !strings.Contains(got, want) || strings.Contains(got, "a-token") {
			t.Errorf("%q, want %q in it", got, want)
		}
	}
}
