package main

import (
	"runtime"
	"testing"
)

func TestTheEnvironmentDecidesOverProcessors(t *testing.T) {
	runtime.SetDefaultGOMAXPROCS()
	cores := runtime.GOMAXPROCS(0)
	t.Setenv("GOMAXPROCS", "")
	tuneRuntime()
	tuneRuntime()
	if n := runtime.GOMAXPROCS(0); n != cores+1 {
		t.Errorf("%d processors for %d cores", n, cores)
	}
	runtime.GOMAXPROCS(cores)
	t.Setenv("GOMAXPROCS", "1")
	if tuneRuntime(); runtime.GOMAXPROCS(0) != cores {
		t.Error("what the environment says is overridden")
	}
}
