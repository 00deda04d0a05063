package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strconv"

	"github.com/meshca/meshca/agent/files"
)

// FilesConfig is one directory of a workload's files.
type FilesConfig struct {
	// Dir is the directory; it is made where it is missing. Nobody but the agent's user and root may be able to write to
	// it. What else lies there is left alone. Required.
	Dir string `json:"dir"`
	// Names are the sets of names to write, one or several: "istio" (cert-chain.pem, key.pem, root-cert.pem), "gke"
	// (certificates.pem, private_key.pem, ca_certificates.pem, trust_bundles.json), "tls" (tls.crt, tls.key, ca.crt),
	// "credentialbundle" (credentialbundle.pem, trustbundle.pem). Required.
	Names []files.Names `json:"names"`
	// Mode of the files that hold the key, octal in quotes; the others have 0644. Default "0600", with a gid "0640".
	Mode string `json:"mode"`
	// UID and GID own the files. Default: the agent's own.
	UID *int `json:"uid"`
	GID *int `json:"gid"`
	// After tells a process that the files changed. Default: nobody is told.
	After *AfterConfig `json:"after"`
}

// AfterConfig tells a process that the files changed, by exactly one of the three. What fails is tried again, after a
// second at first and after a minute at last, and a trust bundle counts as delivered only when it succeeded.
type AfterConfig struct {
	// Signal is sent to a process.
	Signal *SignalConfig `json:"signal"`
	// Command is run as the agent's user, without a shell, in "/", with PATH, LANG=C and MESHCA_DIR (the directory) as its
	// environment. Success is exit code 0.
	Command *CommandConfig `json:"command"`
	// HTTP posts an empty request to this machine. Success is a status of 2xx.
	HTTP *HTTPConfig `json:"http"`
}

// SignalConfig names a process by pidFile, by process, or by both.
type SignalConfig struct {
	// Name is HUP, USR1, USR2, INT, QUIT, TERM or WINCH. Required.
	Name string `json:"name"`
	// PIDFile holds the process's number. Only its owner may be able to write it, and that must be root, the agent's user
	// or the process's own user.
	PIDFile string `json:"pidFile"`
	// Process is the program's name as `ps -o comm` shows it. Without pidFile all processes of that name that see the same
	// PIDs as the agent get the signal, but for those whose parent has that name too. With pidFile: the process must have
	// that name.
	Process string `json:"process"`
}

// CommandConfig is a program to run.
type CommandConfig struct {
	// Argv is the program, by its absolute path, and its arguments. Required.
	Argv []string `json:"argv"`
	// Timeout is when it and what it started is killed: at most "5m". Default "30s".
	Timeout Duration `json:"timeout"`
}

// HTTPConfig is a request to make.
type HTTPConfig struct {
	// URL is where to: http or https, and localhost or a loopback address. Required.
	URL string `json:"url"`
	// Socket is the unix socket on which the server listens. Default: none, it listens where the URL says.
	Socket string `json:"socket"`
	// CAFile verifies the server's certificate (PEM). Default: the system's authorities.
	CAFile string `json:"caFile"`
	// Timeout bounds the exchange: at most "5m". Default "30s".
	Timeout Duration `json:"timeout"`
}

// files is what is to be kept of the workloads' files; nil: nothing.
func (c *Config) files(log *slog.Logger) (*files.Source, error) {
	var entries []files.Entry
	var errs []error
	for i, w := range c.Workloads {
		for j, f := range w.Files {
			made, err := f.files(log)
			if err == nil {
				err = made.Check()
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("workloads[%d].files[%d]: %w", i, j, err))
				continue
			}
			entries = append(entries, files.Entry{Socket: w.Socket, Config: made})
		}
	}
	if len(errs) > 0 || len(entries) == 0 {
		return nil, errors.Join(errs...)
	}
	return files.NewSource(entries)
}

func (f FilesConfig) files(log *slog.Logger) (files.Config, error) {
	c := files.Config{Dir: f.Dir, Names: f.Names, UID: f.UID, GID: f.GID, Log: log}
	if f.Mode != "" {
		mode, err := strconv.ParseUint(f.Mode, 8, 32)
		if err != nil || mode == 0 || mode > 0o777 {
			return c, fmt.Errorf("mode: %q is no file mode: write it in octal and quotes, like \"0640\"", f.Mode)
		}
		c.Mode = fs.FileMode(mode)
	}
	if f.After != nil {
		c.After = f.After.hook()
	}
	return c, nil
}

func (a *AfterConfig) hook() *files.Hook {
	h := &files.Hook{}
	if s := a.Signal; s != nil {
		h.Signal = &files.Signal{Name: s.Name, PIDFile: s.PIDFile, Process: s.Process}
	}
	if c := a.Command; c != nil {
		h.Command = &files.Command{Argv: c.Argv, Timeout: c.Timeout.Duration}
	}
	if r := a.HTTP; r != nil {
		h.HTTP = &files.HTTP{URL: r.URL, Socket: r.Socket, CAFile: r.CAFile, Timeout: r.Timeout.Duration}
	}
	return h
}
