package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshca/meshca/api/serial"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/pkcs11"
)

func TestWhereKeysAre(t *testing.T) {
	for text, want := range map[string]string{
		"intermediate: {key: {in: hsm}}\n":                         `intermediate.key.in: "hsm" is none of memory, disk, pkcs11`,
		"intermediate: {key: {in: disk, uri: \"pkcs11:token=a\"}}": "intermediate.key.uri: it names a PKCS #11 token, and the key is in disk",
		"intermediate: {key: {uri: \"pkcs11:token=a\"}}":           "write `in: pkcs11`",
		"intermediate: {key: {in: pkcs11}}":                        "intermediate.key.uri: name the token",
		"intermediate: {key: {in: disk, pin: \"1234\"}}":           `unknown field "intermediate.key.pin"`,
		"bundleFile: /var/lib/meshca/intermediates\n":              "intermediate.key (kept intermediates): /var/lib/meshca/intermediates is the file of bundleFile",
	} {
		if strings.HasPrefix(text, "bundleFile") {
			text += "intermediate: {key: {in: disk}}\n"
		}
		if _, err := loadConfig(write(t, soundConfig+text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", text, err, want)
		}
	}
	if !pkcs11.Supported {
		return
	}
	const reached = "?module-path=/m.so&pin-source=/pin"
	for text, want := range map[string]string{
		`intermediate: {key: {in: pkcs11, uri: "pkcs11:token=a?module-path=/m.so&pin-value=1"}}`:         "intermediate.key.uri: pin-value: a PIN in the configuration",
		`intermediate: {key: {in: pkcs11, uri: "pkcs11:token=a;object=b;id=c` + reached + `"}}`:          "leave id out",
		`intermediate: {key: {in: pkcs11, uri: "/var/lib/key"}}`:                                         "begins with pkcs11:",
		`upstream: {disk: {keyFile: "pkcs11:token=a` + reached + `"}}`:                                   "upstream.disk.keyFile: the URI names no key",
		`upstream: {disk: {passphraseFile: x, keyFile: "pkcs11:token=a;object=b` + reached + `"}}`:       "has no passphrase",
		"audit: {file: /pin}\nintermediate: {key: {in: pkcs11, uri: \"pkcs11:token=a" + reached + "\"}}": "(pin-source): /pin is the file of audit.file",
	} {
		config := soundConfig + text
		if strings.HasPrefix(text, "upstream") {
			config = strings.Replace(soundConfig, "upstream: {disk: {}}", text, 1)
		}
		if _, err := loadConfig(write(t, config)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", text, err, want)
		}
	}
}

// A CA whose intermediate is kept on disk goes on with it behind a restart, and takes a new one where others could have
// read it only when told to.
func TestARestartGoesOnWithItsIntermediate(t *testing.T) {
	dir := t.TempDir()
	c := configIn(t, dir, clusterIn(t, dir, "a", false))
	c.Intermediate.Key.In = inDisk
	serials := map[string]string{}
	start := func(t *testing.T) {
		r := run(t, c)
		r.until("ready", func() error { return r.gets("/readyz", http.StatusOK, "ok") })
		serials[t.Name()] = serial.String(line(r.daemon).Status().Chain[0].SerialNumber)
		for _, f := range r.checks(t.Context()) {
			if f.GetSubject() == "kept intermediates" {
				serials["check"] = f.GetDetail()
			}
		}
	}
	t.Run("first", start)
	t.Run("second", start)
	first, second := serials[t.Name()+"/first"], serials[t.Name()+"/second"]
	if first == "" || second != first {
		t.Errorf("the first start signed with %s, the second with %s", first, second)
	}
	if !strings.Contains(serials["check"], "readable by the CA alone") {
		t.Errorf("a check says %q of what is kept", serials["check"])
	}
	kept, err := filepath.Glob(filepath.Join(dir, "intermediates", "*"))
	if err != nil || len(kept) != 1 {
		t.Fatalf("kept: %v, %v", kept, err)
	}
	if err := os.Chmod(kept[0], 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t.Context(), c, slog.New(slog.DiscardHandler), io.Discard); err == nil || !strings.Contains(err.Error(), "delete it: the CA then takes a new intermediate") {
		t.Errorf("a key that others can read: %v", err)
	}
	if err := os.Chmod(kept[0], 0o600); err != nil {
		t.Fatal(err)
	}
	// In memory again, nothing is left of it.
	c.Intermediate.Key.In = inMemory
	t.Run("third", start)
	if left, err := os.ReadDir(filepath.Join(dir, "intermediates")); err != nil || len(left) != 0 || serials[t.Name()+"/third"] == first {
		t.Errorf("left: %v, %v", left, err)
	}
}

// A taint holds also where the upstream is away, so that nothing replaces what was stolen, and the CA starts again.
func TestATaintHoldsBehindARestart(t *testing.T) {
	dir := t.TempDir()
	c := configIn(t, dir, clusterIn(t, dir, "a", false))
	c.Intermediate.Key.In = inDisk
	d := signing(t, c)
	kept := func() int {
		files, err := filepath.Glob(filepath.Join(dir, "intermediates", "*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(files)
	}
	if kept() != 1 {
		t.Fatal("nothing is kept")
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel() // nobody renews
	if _, err := d.operator.RotateIntermediate(ended, ca.MaxTTL); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if kept() != 0 {
		t.Error("what was stolen is still kept")
	}
	if d.authority.Ready() != nil {
		t.Errorf("until it is replaced it signs: %v", d.authority.Ready())
	}
}
