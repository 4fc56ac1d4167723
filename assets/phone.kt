// The phone's side in an Android app: the Python functions protect() and ask(), in Kotlin.
//
//     val phone = Phone(context)
//     val answer = recognise(phone.protect(photo), host, port)
//
// The app needs androidx.core; org.pytorch:executorch-android, of the version that exported the file; the file,
// in 32 or in 8 bits, among its assets, as generator.pte; and the permission android.permission.INTERNET. This has
// been compiled and run with stand-ins for the classes of Android, androidx and ExecuTorch, never with the real ones.

import android.content.Context
import android.graphics.Bitmap
import androidx.core.graphics.BitmapCompat
import java.io.ByteArrayOutputStream
import java.io.File
import java.net.InetSocketAddress
import java.net.Socket
import kotlin.math.roundToInt
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

const val SIZE = 32  // pixels a side that the generator was trained for: at that size it hides
const val TIME_LIMIT = 10_000  // milliseconds that the phone waits for the service

// Make one Phone, off the main thread: it copies and loads the file.
class Phone(context: Context) {
    private val generator: Module

    init {
        val file = File(context.filesDir, "generator.pte")  // ExecuTorch reads files, not assets
        context.assets.open("generator.pte").use { asset ->
            file.outputStream().use { asset.copyTo(it) }
        }
        generator = Module.load(file.path)
    }

    // The picture must be upright and opaque. It is shrunk first, then protected. Pillow, in open_image, shrinks with a
    // bicubic filter; the nearest for Android is BitmapCompat's: steps of a bilinear one, most of them by a half.
    fun protect(picture: Bitmap): Bitmap {
        val small = BitmapCompat.createScaledBitmap(picture, SIZE, SIZE, null, false)
        val n = SIZE * SIZE
        val pixels = IntArray(n)
        small.getPixels(pixels, 0, SIZE, 0, 0, SIZE, SIZE)
        val x = FloatArray(3 * n)  // all reds, all greens, all blues
        for (i in 0 until n) {
            x[i] = (pixels[i] shr 16 and 255) / 255f
            x[n + i] = (pixels[i] shr 8 and 255) / 255f
            x[2 * n + i] = (pixels[i] and 255) / 255f
        }
        val image = Tensor.fromBlob(x, longArrayOf(1, 3, SIZE.toLong(), SIZE.toLong()))
        val y = generator.forward(EValue.from(image))[0].toTensor().dataAsFloatArray
        for (i in 0 until n) {
            val red = (255 * y[i]).roundToInt()
            val green = (255 * y[n + i]).roundToInt()
            val blue = (255 * y[2 * n + i]).roundToInt()
            pixels[i] = (255 shl 24) or (red shl 16) or (green shl 8) or blue
        }
        return Bitmap.createBitmap(pixels, SIZE, SIZE, Bitmap.Config.ARGB_8888)
    }
}

// The protocol of the authors' app. Call this off the main thread, and only with what protect() has returned. It
// returns CIFAR-10's class, 0 to 9 (airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck); negative
// if the service refused the picture. It throws an IOException if the service is not there.
fun recognise(protected: Bitmap, host: String, port: Int): Int {
    val png = ByteArrayOutputStream()
    protected.compress(Bitmap.CompressFormat.PNG, 100, png)
    val length = png.size().toString().padEnd(16)
    Socket().use { connection ->
        connection.connect(InetSocketAddress(host, port), TIME_LIMIT)
        connection.soTimeout = TIME_LIMIT
        connection.getOutputStream().write(length.toByteArray() + png.toByteArray())
        return connection.getInputStream().read() - '0'.code
    }
}
