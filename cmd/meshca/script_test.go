package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/pkcs11"
	"github.com/meshca/meshca/ca/upstream/disk"
)

func TestMain(m *testing.M) {
	// The runtime's goroutine for signals begins with the first Notify, and must not belong to a test's bubble.
	first := make(chan os.Signal, 1)
	signal.Notify(first, syscall.SIGWINCH)
	signal.Stop(first)
	testscript.Main(m, map[string]func(){"meshca": main})
}

// TestScripts runs testdata/*.txtar: the real program on real files.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata", RequireUniqueNames: true, RequireExplicitExec: true,
		Condition: func(name string) (bool, error) {
			if name != "pkcs11" {
				return false, fmt.Errorf("no condition is called %q", name)
			}
			return pkcs11.Supported, nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"root": checkRootFiles},
	})
}

// checkRootFiles is `root DIR NAME YEARS`: the root in DIR has this name and life, its key is private, and it signs an
// intermediate.
func checkRootFiles(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: root DIR NAME YEARS")
	}
	files := disk.Files{Cert: ts.MkAbs(filepath.Join(args[0], "root.crt")), Key: ts.MkAbs(filepath.Join(args[0], "root.key"))}
	for file, want := range map[string]os.FileMode{files.Cert: 0o644, files.Key: 0o600} {
		info, err := os.Stat(file)
		ts.Check(err)
		if info.Mode() != want {
			ts.Fatalf("%s has mode %v, want %v", file, info.Mode(), want)
		}
	}
	upstream, err := disk.Open(disk.Options{Root: files})
	ts.Check(err)
	issuers, err := upstream.Issuers(context.Background())
	ts.Check(err)
	root := issuers[0].Root
	years, err := strconv.Atoi(args[2])
	ts.Check(err)
	life := time.Until(root.NotAfter)
	if want := time.Duration(years) * 365 * 24 * time.Hour; len(issuers) != 1 || root.Subject.CommonName != args[1] || (life-want).Abs() > time.Hour {
		ts.Fatalf("%d roots, the first %s with %s left", len(issuers), root.Subject, life)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ts.Check(err)
	chain, err := upstream.SignIntermediate(context.Background(), issuers[0].Ref, ca.IntermediateRequest{
		PublicKey: key.Public(), TrustDomain: spiffeid.RequireTrustDomainFromString("mesh.test"), Life: time.Hour, CommonName: "intermediate",
	})
	ts.Check(err)
	ts.Check(chain[0].CheckSignatureFrom(root))
}
