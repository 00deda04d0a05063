// Inpod is what tests have done in pods: a container's image holds no shell.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const usage = `usage: inpod COMMAND
  pause            waits for SIGTERM
  serve ADDRESS    answers HTTP requests with the pod's name, until SIGTERM
  fetch URL        prints what one answers
  cat FILE         prints it
  traffic URL RATE ADDRESS
                   sends RATE requests a second, and answers HTTP requests with what came of them as JSON, until SIGTERM
  serve-mtls ADDRESS FOLDER
                   answers HTTPS requests of peers with an SVID, with who they are and which certificate was shown to them;
                   from FOLDER: credentials.pem, a key and its chain, and trust.pem, read again at each connection
  fetch-mtls URL FOLDER
                   prints what one answers
  mount FOLDER     makes a file system in memory there, with a file "mounted" in it; then as pause`

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "inpod:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if len(args) == 1 && args[0] == "pause" {
		<-ctx.Done()
		return nil
	}
	if len(args) == 4 && args[0] == "traffic" {
		return traffic(ctx, args[1], args[2], args[3])
	}
	if len(args) == 3 {
		switch args[0] {
		case "serve-mtls":
			return serveMTLS(ctx, args[1], args[2])
		case "fetch-mtls":
			return fetchMTLS(ctx, args[1], args[2])
		}
	}
	if len(args) != 2 {
		return errors.New(usage)
	}
	switch args[0] {
	case "serve":
		return serve(ctx, args[1])
	case "fetch":
		return fetch(ctx, args[1])
	case "cat":
		text, err := os.ReadFile(args[1])
		fmt.Print(string(text))
		return err
	case "mount":
		if err := mount(args[1]); err != nil {
			return err
		}
		fmt.Println("mounted")
		<-ctx.Done()
		return nil
	}
	return errors.New(usage)
}

func serve(ctx context.Context, address string) error {
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	server := &http.Server{Addr: address, ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, name)
	})}
	defer context.AfterFunc(ctx, func() { _ = server.Close() })()
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func fetch(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	return show(http.DefaultClient, request)
}

// show prints what a request is answered.
func show(client *http.Client, request *http.Request) error {
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if _, err := io.Copy(os.Stdout, io.LimitReader(answer.Body, 1<<20)); err != nil {
		return err
	}
	if answer.StatusCode != http.StatusOK {
		return errors.New(answer.Status)
	}
	return nil
}

func mount(folder string) error {
	if err := unix.Mount("tmpfs", folder, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size=1m"); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(folder, "mounted"), []byte("by a pod"), 0o644)
}
